package agent

import (
	"bytes"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// The name of a socket is whose process takes it first, and one without rights may do so while no agent runs, as in an
// upgrade.
func TestAProcessWithoutRightsKeepsNoAgentFromStarting(t *testing.T) {
	netns.Enter(t)
	here := netns.Current(t)
	type listening struct {
		l   net.Listener
		err error
	}
	taken := make(chan listening)
	go func() {
		runtime.LockOSThread() // which ends with the goroutine
		const nobody = 65534
		err := unix.Setns(here, unix.CLONE_NEWNET)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); err == nil && errno != 0 {
			err = errno
		}
		var l net.Listener
		if err == nil {
			l, err = net.Listen("unix", Socket)
		}
		taken <- listening{l, err}
	}()
	other := <-taken
	if other.err != nil {
		t.Fatal(other.err)
	}
	var log bytes.Buffer
	lock, err := lockNode(slog.New(slog.NewTextHandler(&log, nil)))
	if lock != nil || err != nil || !strings.Contains(log.String(), "of user 65534") {
		t.Errorf("a socket of another user: %v, error %v, log %q; want no socket, no error, and who has it", lock, err, log.String())
	}
	other.l.Close()
	if lock, err = lockNode(slog.New(slog.DiscardHandler)); err != nil || lock == nil {
		t.Fatalf("a name that is free: %v, error %v", lock, err)
	}
	defer lock.Close()
	if second, err := lockNode(slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "another egret agent runs") {
		t.Errorf("a second agent: %v, error %v; want that it is refused", second, err)
	}
}
