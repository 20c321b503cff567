package announce

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/netns"
)

// neighbor makes a host, linked to the namespace of the calling thread by eth0, that has fd10::200; here are fd10::101
// on eth0 and fd10::8 on a link of its own that is down, as Egret has its egress IPs. It returns what runs a command
// there.
func neighbor(t *testing.T) func(line string) (string, error) {
	t.Helper()
	name := fmt.Sprintf("egann-%d", os.Getpid())
	netns.Run(t, "ip netns add "+name)
	t.Cleanup(func() { netns.Run(t, "ip netns del "+name) })
	there := func(line string) (string, error) {
		out, err := exec.Command("ip", append([]string{"netns", "exec", name}, strings.Fields(line)...)...).CombinedOutput()
		return string(out), err
	}
	for line := range strings.Lines(`ip link add eth0 address 02:00:00:00:00:01 type veth peer name eth0 netns ` + name + `
		ip addr add fd10::101/64 dev eth0 nodad
		ip addr add 10.0.0.101/24 dev eth0
		ip link set eth0 up
		ip link add egret0 type bridge
		ip addr add fd10::8/128 dev egret0 nodad preferred_lft 0`) {
		netns.Run(t, strings.TrimSpace(line))
	}
	for line := range strings.Lines("ip addr add fd10::200/64 dev eth0 nodad\nip addr add 10.0.0.200/24 dev eth0\nip link set eth0 up") {
		if out, err := there(line); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	// Until both ends noted that their carrier came, what is sent is dropped without a word.
	eventually(t, "no carrier", func() bool {
		out, _ := there("ip link show eth0") // an error shows as not up
		return strings.Contains(out, "state UP") && strings.Contains(netns.Run(t, "ip link show eth0"), "state UP")
	})
	return there
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after 10 s: %s", what)
		}
	}
}

func TestAnUnsolicitedAdvertisementMovesTheAddress(t *testing.T) {
	netns.Enter(t)
	there := neighbor(t)
	if out, err := there("ip -6 neigh add fd10::8 lladdr 02:00:00:00:00:09 dev eth0 nud stale"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	asked := 0
	for _, permit := range []bool{false, true} {
		if err := sendNA("eth0", netip.MustParseAddr("fd10::8"), func(netip.Addr) bool { asked++; return permit }); err != nil {
			t.Fatal(err)
		}
		if !permit {
			time.Sleep(100 * time.Millisecond)
			if out, err := there("ip -6 neigh show fd10::8 dev eth0"); err != nil || !strings.Contains(out, "02:00:00:00:00:09") {
				t.Errorf("without a permit: %v, %s", err, out)
			}
		}
	}
	eventually(t, "the neighbor has not taken the new MAC address over", func() bool {
		out, _ := there("ip -6 neigh show fd10::8 dev eth0") // an error shows as no address
		return strings.Contains(out, "02:00:00:00:00:01")
	})
	if asked != 2 {
		t.Errorf("asked for a permit %d times, want 2", asked)
	}
}
