package main

import (
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// timerSlack is by how much later than asked for the kernel may wake a thread of the agent. The Go runtime's monitor
// sleeps for 20 us, many times, after each bit of work of an agent at rest: a quarter of all that this takes. By a
// millisecond it sleeps once, and one wake-up serves several timers.
const timerSlack = time.Millisecond

// withTimerSlack gives the process timerSlack, by starting its program anew: a thread has the slack of the one that
// began it, and the monitor begins before main. It returns when the process has the slack, or may not have it (the
// kernel gives none to real-time threads). It is called before signals are caught, so that none is lost.
func withTimerSlack() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	has := func() bool {
		have, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
		return err == nil && time.Duration(have) >= timerSlack
	}
	if has() {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(timerSlack), 0, 0, 0); err != nil || !has() {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	return fmt.Errorf("starting %s anew: %w", program, unix.Exec(program, os.Args, os.Environ()))
}
