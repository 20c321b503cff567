//go:build !race

package crdsync

// raceFactor is that of race_test.go, without the detector.
const raceFactor = 1
