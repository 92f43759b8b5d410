"""`fastcure report`: what the paper shows of a network before and after fine-tuning, on one page."""
