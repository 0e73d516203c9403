"""The synergy speedrun: submissions, their score, the leaderboard."""
