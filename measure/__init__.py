"""A model and labelled images → figures, golden answers, and the page that shows them."""
