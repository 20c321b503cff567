package integration

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// TestMTUFollowsTheUplink looks at a pod whose packets go over the overlay: by IPv4, that takes 50 bytes of the
// uplink's MTU.
func TestMTUFollowsTheUplink(t *testing.T) {
	n := newNamespace(t)
	n.dual("mtu", "10.10.0.48", "fd10::48")
	ips := bothIPs(t, "mtu")
	_, gateway := held(t, "mtu")
	node := otherNode(gateway)
	pod := n.pod("web", node, "web")
	selected(t, pod, ips...)
	setMTU := func(mtu int) {
		t.Helper()
		if out, err := cluster.Exec(context.Background(), "node", node, "ip", "link", "set", "eth0", "mtu", fmt.Sprint(mtu)); err != nil {
			t.Errorf("setting the MTU: %v\n%s", err, out)
		}
	}
	t.Cleanup(func() { setMTU(1500) })

	for _, uplink := range []int{1500, 1400, 1500} {
		setMTU(uplink)
		overlay := uplink - 50
		eventually(t, 5*time.Second, func() error {
			out, err := cluster.Exec(t.Context(), "node", node, "ip", "link", "show", "egret.vx")
			if err == nil && !strings.Contains(string(out), fmt.Sprintf(" mtu %d ", overlay)) {
				err = fmt.Errorf("uplink %d: %s", uplink, out)
			}
			return err
		})
		fits(t, pod, node, overlay, ips)
	}
	fits(t, n.pod("local", gateway, "web"), gateway, 1450, ips)

	for _, ip := range ips {
		before := fragments(t, node, gateway, pod)
		sent := 0.0
		for sent < 1e9 {
			bits, err := cluster.Throughput(t.Context(), pod, outsideOf(ip), 3*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			sent += bits * 3 / 8
		}
		if after := fragments(t, node, gateway, pod); before != after {
			t.Errorf("%.1f GB to %s: fragments before\n%s\nafter\n%s", sent/1e9, outsideOf(ip), before, after)
		}
	}
}

// fits checks that the packets of a pod may be as large as the overlay's MTU: what is larger and not to be fragmented
// is answered with that, but where the pod's own node is the gateway, and leaves the pod by itself; and the MSS of TCP
// follows from it, both ways, wherever the gateway is.
func fits(t *testing.T, pod, node string, overlay int, ips []netip.Addr) {
	t.Helper()
	owners := ownership(t)
	for i, ip := range ips {
		leavesAs(t, pod, ip)
		headers := 28 + 20*i
		// The first packet too large is answered by its link's MTU; what the pod has learnt is flushed each time.
		for _, size := range []int{overlay, overlay + 1, 1400} {
			want := " 0% packet loss"
			if size > overlay && owners[ip] != node {
				want = fmt.Sprintf("mtu ?= ?%d", overlay)
			}
			out, _ := cluster.Exec(t.Context(), "pod", pod, "sh", "-c", fmt.Sprintf( // it fails when nothing comes back
				"ip -4 route flush cache; ip -6 route flush cache; ping -n -c1 -W2 -M do -s %d %s 2>&1", size-headers, outsideOf(ip)))
			if !regexp.MustCompile(want).Match(out) {
				t.Errorf("overlay %d: a packet of %d bytes, not to be fragmented, from %s to %s:\n%s\nwant %q", overlay, size, pod, outsideOf(ip), out, want)
			}
		}
		headers = 40 + 20*i
		for where, name := range map[string]string{"outside": "", "pod": pod} {
			if got, want := offered(t, where, name, pod, outsideOf(ip)), overlay-headers; got != want {
				t.Errorf("overlay %d: an MSS of %d arrives at %s, want %d", overlay, got, where, want)
			}
		}
	}
}

var mssOption = regexp.MustCompile(`mss (\d+)`)

// offered returns the MSS that arrives in a namespace when the pod opens a connection.
func offered(t *testing.T, kind, name, pod string, to netip.Addr) (mss int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	type result struct {
		out []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		filter := fmt.Sprintf("tcp and port %d and (%s host %s)", lab.EchoPort, map[string]string{"outside": "dst", "pod": "src"}[kind], to)
		if to.Is6() {
			filter += " and ip6[53] & 2 != 0"
		} else {
			filter += " and tcp[13] & 2 != 0"
		}
		out, err := cluster.Exec(ctx, kind, name, "tcpdump", "-nn", "-c1", "-i", "eth0", filter)
		done <- result{out, err}
	}()
	for {
		select {
		case r := <-done:
			m := mssOption.FindSubmatch(r.out)
			if r.err != nil || m == nil {
				t.Fatalf("no SYN seen in %s %s: %v\n%s", kind, name, r.err, r.out)
			}
			if _, err := fmt.Sscan(string(m[1]), &mss); err != nil {
				t.Fatal(err)
			}
			return mss
		case <-time.After(200 * time.Millisecond): // until tcpdump listens
			if _, err := cluster.SourceTo(ctx, pod, to); err != nil && ctx.Err() == nil {
				t.Log(err)
			}
		}
	}
}

// fragments returns what the kernels have counted of fragments, made and put together.
func fragments(t *testing.T, node, gateway, pod string) string {
	t.Helper()
	var b strings.Builder
	for _, where := range [][2]string{{"node", node}, {"node", gateway}, {"pod", pod}, {"outside", ""}} {
		out, err := cluster.Exec(t.Context(), where[0], where[1], "sh", "-c",
			"awk '/^Ip:/ {print $15, $18, $20}' /proc/net/snmp; grep -E 'Ip6(Reasm|Frag)' /proc/net/snmp6")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %s:\n%s", where[0], where[1], out)
	}
	return b.String()
}
