package check

import (
	"fmt"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"
)

// Level says how much a finding matters.
type Level string

// The levels.
const (
	OK      Level = "ok"
	Warning Level = "warning" // something is refused, or may go wrong
	Missing Level = "missing" // the agent cannot work
)

// Finding is one thing that was looked at.
type Finding struct {
	Check string `json:"check"`
	Level Level  `json:"level"`
	Found string `json:"found"`
	For   string `json:"for"` // what needs it
	// Consequence is empty where nothing is wrong.
	Consequence string `json:"consequence,omitempty"`
}

// Run looks at all there is to look at, always in the same order. nodeIP is the address of the overlay; the zero Addr: that of the
// default route's link is looked at instead. An error means that nothing could be looked at.
func Run(nodeIP netip.Addr) ([]Finding, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("reading the kernel's version: %w", err)
	}
	out := []Finding{{Check: "kernel", Level: OK, Found: unix.ByteSliceToString(u.Release[:]), For: "everything"}}
	out = append(out, features()...)
	out = append(out, sysctls()...)
	out = append(out, collisions()...)
	out = append(out, beside()...)
	return append(out, uplink(nodeIP)), nil
}

// Names returns what a kernel has of the features that can be missing: what agents publish.
func Names(findings []Finding) []string {
	var out []string
	for _, f := range findings {
		for _, p := range probes {
			if p.name == f.Check && f.Level == OK {
				out = append(out, f.Check)
			}
		}
	}
	return out
}

// features tries all probes in a network namespace of their own.
func features() []Finding {
	done := make(chan []Finding)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine, and the namespace with the thread
		err := unix.Unshare(unix.CLONE_NEWNET)
		var out []Finding
		for _, p := range probes {
			f := Finding{Check: p.name, Level: OK, Found: "yes", For: p.use}
			if err != nil {
				f.Level, f.Found, f.Consequence = Warning, fmt.Sprintf("unknown: making a network namespace: %v", err), "run the check with CAP_SYS_ADMIN"
			} else if err := p.try(); err != nil {
				f.Level, f.Found, f.Consequence = p.level, fmt.Sprintf("no: %v", err), p.consequence
			}
			out = append(out, f)
		}
		done <- out
	}()
	return <-done
}
