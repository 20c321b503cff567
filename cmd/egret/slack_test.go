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
		threads, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(agent.Process.Pid), "task"))
		if err != nil {
			t.Fatal(err)
		}
		var other []string
		for _, thread := range threads {
			slack, err := os.ReadFile(filepath.Join("/proc", thread.Name(), "timerslack_ns"))
			if got := strings.TrimSpace(string(slack)); err == nil && got != strconv.FormatInt(timerSlack.Nanoseconds(), 10) {
				other = append(other, got)
			}
		}
		if len(threads) > 2 && len(other) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d threads, of which some have a slack of %v ns, want %v for all", len(threads), other, timerSlack)
		}
	}
}
