"""The app in a browser: conversations that are answered twice, and the page that shows them."""

BUILT_IN = "scenes (built in)"  # the name in the menu of the built-in model
