"""`fastcure report`: what the paper shows of a network before and after CURE, on one page."""
