"""The public API is what the committed file says: a change of a name or signature is a diff that can be read."""

from public_api import FILE, public_api


def test_names_and_signatures_are_those_of_the_file() -> None:
    was, found = FILE.read_text().splitlines(), public_api().splitlines()
    gone, new = [line for line in was if line not in found], [line for line in found if line not in was]
    assert found == was, "\n".join(
        [
            "the public API has changed; if that is meant, run `make api` and commit public_api.txt",
            *(f"- {line}" for line in gone),
            *(f"+ {line}" for line in new),
        ]
    )
