package cloud

import "time"

// Quick makes the waits short, for tests that look at what is done and not at when.
func Quick(c *Config, check time.Duration, doubts ...time.Duration) {
	c.CheckInterval = check
	if len(doubts) == 0 {
		doubts = []time.Duration{10 * time.Second}
	}
	c.pace = pace{
		doubts: doubts, first: 20 * time.Millisecond, most: 100 * time.Millisecond,
		refused: 50 * time.Millisecond, never: 200 * time.Millisecond, call: 2 * time.Second,
	}
}
