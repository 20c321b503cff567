//go:build race

package crdsync

// raceFactor is by how much more the race detector may have a test cost that has a limit of time on a processor.
const raceFactor = 20
