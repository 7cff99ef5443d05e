"""The app in a browser: conversations that are answered twice, and the page that shows them."""
