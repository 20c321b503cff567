package check

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"

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

// Run looks at all there is to look at, always in the same order. nodeIP is the address of the overlay; the zero Addr:
// that of the default route's link is looked at instead. An error means that nothing could be looked at.
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

// Untried is the name of the check for what could not be tried for want of a network namespace.
const Untried = "kernel-features"

// features tries all probes in a network namespace of their own. Where none can be made (CAP_SYS_ADMIN), it tries in
// the caller's those that change nothing there.
func features() []Finding {
	done := make(chan []Finding)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine, and the namespace with the thread
		done <- tryAll(unix.Unshare(unix.CLONE_NEWNET))
	}()
	return <-done
}

// tryAll tries all probes; err says why the thread is not in a network namespace of its own.
func tryAll(err error) []Finding {
	var out []Finding
	var untried []string
	for _, p := range probes {
		try := p.try
		if err != nil {
			try = p.dryRun
		}
		if try == nil {
			untried = append(untried, p.name)
			continue
		}
		f := Finding{Check: p.name, Level: OK, Found: "yes", For: p.use}
		if err := try(); err != nil {
			f.Level, f.Found, f.Consequence = p.level, fmt.Sprintf("no: %v", err), p.consequence
		}
		out = append(out, f)
	}
	if len(untried) > 0 {
		out = append(out, Finding{Check: Untried, Level: Warning, For: "everything",
			Found:       fmt.Sprintf("not tried (%s): making a network namespace: %v", strings.Join(untried, ", "), err),
			Consequence: "what is missing of it, the agent finds when it starts: run the check on the node, as root with CAP_SYS_ADMIN"})
	}
	return out
}
