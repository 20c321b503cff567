package main

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/need"
)

// All threads of an agent have the slack, the Go runtime's monitor, too, which begins before any code of ours.
func TestTheKernelMayWakeEachThreadOfAnAgentLater(t *testing.T) {
	need.Root(t)
	agent := process(t, io.Discard, "agent", "--node", "n1", "--insecure", "--endpoints", "127.0.0.1:1", "--gossip-port", "0", "--status-address", "")
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		files, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(agent.Process.Pid), "task/*/comm"))
		if err != nil {
			t.Fatal(err)
		}
		var other []string
		for _, f := range files {
			slack, err := os.ReadFile(filepath.Join("/proc", filepath.Base(filepath.Dir(f)), "timerslack_ns"))
			if got := strings.TrimSpace(string(slack)); err == nil && got != strconv.FormatInt(timerSlack.Nanoseconds(), 10) {
				other = append(other, got)
			}
		}
		if len(files) > 2 && len(other) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d threads, of which some have a slack of %v ns, want %v for all", len(files), other, timerSlack)
		}
	}
}
