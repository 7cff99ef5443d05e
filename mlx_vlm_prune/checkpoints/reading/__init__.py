"""Files of strangers, of any kind, each checked as it is read; files of ours, written whole."""
