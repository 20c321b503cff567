package vlan

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

// No agent runs here: what answers is the kernel, also after everything that made it do so is closed.
func TestTheKernelAnswersSolicitationsForAnAddressOfAnotherLink(t *testing.T) {
	l := open(t)
	there := neighbor(t)
	netns.Run(t, "sysctl -qw net.ipv6.conf.all.forwarding=1")
	e := netip.MustParseAddr("fd10::8")
	reached := func(ip string) bool {
		if _, err := there("ip -6 neigh flush dev eth0"); err != nil {
			t.Error(err)
		}
		_, err := there("ping -6 -c1 -W0.5 " + ip)
		return err == nil
	}
	// rtt returns what ping measures, in ms: to start it takes longer, in an emulated machine.
	rtt := func(ip string) (ms float64) {
		if _, err := there("ip -6 neigh flush dev eth0"); err != nil {
			t.Error(err)
		}
		out, err := there("ping -6 -c1 -W2 " + ip)
		_, after, found := strings.Cut(out, " time=")
		if _, scan := fmt.Sscan(after, &ms); err != nil || !found || scan != nil {
			t.Errorf("%s is not reached: %v\n%s", ip, err, out)
		}
		return ms
	}
	eventually(t, "the node does not answer for its own address", func() bool { return reached("fd10::101") })
	netns.Run(t, "ip -6 neigh add proxy fd10::9 dev eth0")
	const settings = "sysctl net.ipv6.conf.eth0.proxy_ndp net.ipv6.neigh.eth0.proxy_delay"
	before := netns.Run(t, settings)
	if reached("fd10::8") {
		t.Fatal("the kernel answers by itself: the test proves nothing")
	}
	want := State{Addresses: []netip.Addr{e}, Answers: map[string][]netip.Addr{"eth0": {e, netip.MustParseAddr("10.0.0.8")}}}
	reach(t, l, want)
	late := 0
	for range 10 { // the kernel's usual delay is random, up to 800 ms
		if took := rtt("fd10::8"); took > 200 {
			t.Logf("answered after %v ms", took)
			late++
		}
	}
	if late > 1 { // a busy machine may be
		t.Errorf("%d of 10 times it was not answered at once", late)
	}
	// The neighbour asks whether what it knows still holds, at the address itself.
	if out, err := there("ip -6 neigh change fd10::8 dev eth0 nud probe"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	eventually(t, "a question at the address itself is not answered", func() bool {
		out, _ := there("ip -6 neigh show fd10::8 dev eth0") // an error shows as no REACHABLE
		return strings.Contains(out, "REACHABLE")
	})
	if out, err := there("ip -6 addr add fd10::8/64 dev eth0"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	eventually(t, "a host takes the address, and duplicate address detection does not keep it", func() bool {
		out, _ := there("ip -6 addr show dev eth0") // an error shows as no failure
		return strings.Contains(out, "dadfailed")
	})
	if out, err := there("ip -6 addr del fd10::8/64 dev eth0"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	for what, breaks := range map[string]string{
		"the entry": "ip -6 neigh del proxy fd10::8 dev eth0", "the group": "ip addr del ff02::1:ff00:8/128 dev eth0",
		"the sysctl": "sysctl -qw net.ipv6.conf.eth0.proxy_ndp=0", "the delay": "sysctl -qw net.ipv6.neigh.eth0.proxy_delay=80",
	} {
		netns.Run(t, breaks)
		if Diff(observe(t, l), want).Empty() {
			t.Errorf("that %s was lost is not seen", what)
		}
		reach(t, l, want)
	}
	eventually(t, "not answered after the repair", func() bool { return reached("fd10::8") })
	reach(t, l, State{})
	if reached("fd10::8") {
		t.Error("withdrawn, and answered")
	}
	for _, on := range []string{"0", "1"} { // as it was before
		netns.Run(t, "sysctl -qw net.ipv6.conf.eth0.proxy_ndp="+on)
		before = strings.Replace(before, "proxy_ndp = 0", "proxy_ndp = "+on, 1)
		reach(t, l, want)
		if err := l.Delete(); err != nil {
			t.Error(err)
		}
		if after := netns.Run(t, settings); after != before {
			t.Errorf("after Delete:\n%swant\n%s", after, before)
		}
	}
	left := netns.Run(t, "ip -6 neigh show proxy") + netns.Run(t, "ip -6 maddr show dev eth0") + netns.Run(t, "ip addr show dev eth0")
	if !strings.Contains(left, "fd10::9 dev eth0") || strings.Contains(left, "fd10::8") || strings.Contains(left, "ff02::1:ff00:8") {
		t.Errorf("after Delete there is:\n%s\nwant the entry of somebody else alone", left)
	}
}
