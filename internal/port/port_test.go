package port_test

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/port"
)

func TestAPortIsHeldUntilTheTestEnds(t *testing.T) {
	seen := map[int]bool{}
	for range 200 {
		p := port.Hold(t)
		if seen[p] {
			t.Fatalf("port %d was given out twice", p)
		}
		seen[p] = true
	}
	var p int
	t.Run("inner", func(t *testing.T) { p = port.Hold(t) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprint("@egret/test/port/", p)})
	if err != nil {
		t.Fatalf("port %d is held after its test: %v", p, err)
	}
	l.Close()
}

// A port that was chosen by listening at 0 and closing again was lost so.
func TestTheKernelGivesOutNoPortThatATestHolds(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		t.Fatal(err)
	}
	low, err := strconv.Atoi(strings.Fields(string(b))[0])
	if err != nil {
		t.Fatal(err)
	}
	if p := port.Hold(t); p >= low {
		t.Errorf("port %d is held: the kernel gives out ports from %d on", p, low)
	}
}
