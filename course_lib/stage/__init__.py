"""What an instructor shows live: each lecture's explorers full screen, and its slides."""
