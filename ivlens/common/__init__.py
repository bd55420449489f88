"""What every room uses: files, statistics, keys, near names."""
