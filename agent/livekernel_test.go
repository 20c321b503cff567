package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// A node that translates what its pod sends, as the gateway of its egress IP, and nobody at the port that the pod
// connects to.
func TestTheKernelTellsTheWayOfAPodsPacketAndOfItsAnswer(t *testing.T) {
	netns.Enter(t)
	pod, outside := fmt.Sprintf("eglive-p%d", os.Getpid()), fmt.Sprintf("eglive-o%d", os.Getpid())
	for _, name := range []string{pod, outside} {
		netns.Run(t, "ip netns add "+name)
		t.Cleanup(func() { netns.Run(t, "ip netns del "+name) })
	}
	mark := egress.ID(7).ConnMark()
	for _, line := range []string{
		"ip link add pod0 type veth peer name eth0 netns " + pod, "ip link set pod0 up", "ip addr add 10.244.0.1/24 dev pod0",
		"ip -n " + pod + " addr add 10.244.0.5/24 dev eth0", "ip -n " + pod + " link set eth0 up", "ip -n " + pod + " route add default via 10.244.0.1",
		"ip link add out0 type veth peer name eth0 netns " + outside, "ip link set out0 up", "ip addr add 203.0.113.1/24 dev out0",
		"ip -n " + outside + " addr add 203.0.113.9/24 dev eth0", "ip -n " + outside + " link set eth0 up", "ip -n " + outside + " route add 10.10.0.11 via 203.0.113.1",
		"sysctl -qw net.ipv4.ip_forward=1", "nft add table ip nat", "nft add chain ip nat pre { type filter hook prerouting priority -150; }",
		fmt.Sprintf("nft add rule ip nat pre ip saddr 10.244.0.5 ct mark set %d", mark),
		"nft add chain ip nat post { type nat hook postrouting priority -199; }", "nft add rule ip nat post ip saddr 10.244.0.5 ip protocol tcp snat to 10.10.0.11:600-700",
		"nft add rule ip nat post ip saddr 10.244.0.5 snat to 10.10.0.11",
		"nft add table ip fw", "nft add chain ip fw before { type filter hook prerouting priority 0; }", "nft add chain ip fw c { type filter hook forward priority 0; }",
		"nft add chain ip fw after { type filter hook postrouting priority 0; }",
	} {
		netns.Run(t, line)
	}
	d := plan.Desired{NFT: nft.State{Pods: map[netip.Addr]egress.ID{livePod: 7}, Hosted: map[egress.ID]nft.Hosted{7: {IP: liveIP}}}}
	a := &agent{kernel: &kernel{}}
	a.kernel.programmed.begin()(&d)
	own := map[byte]func(){
		6: func() {
			if c, err := net.DialTimeout("tcp4", "203.0.113.9:7", time.Second); err == nil {
				c.Close()
			}
		},
		1: func() { _ = exec.Command("ping", "-c1", "-W1", "203.0.113.9").Run() }, // seen by its packets
	}
	for _, tt := range []struct {
		name, rule string
		protocol   byte
		port       uint16
		send       bool   // in the pod's name; else it sends itself
		back       string // the chain that drops the answer; "": it comes to the pod
	}{
		{"a connection", "", 6, 7, false, ""},
		{"an echo", "", 1, 0, false, ""},
		{"a connection in the pod's name", "", 6, 7, true, ""},
		{"an echo in the pod's name", "", 1, 0, true, ""},
		{"an answer that is dropped", "nft add rule ip fw c ip saddr 203.0.113.9 drop", 6, 7, false, "c"},
		{"an answer to what is in the pod's name that is dropped", "", 6, 7, true, "c"},
	} {
		if tt.rule != "" {
			netns.Run(t, tt.rule)
		}
		stop, done := make(chan bool), make(chan error)
		go func() {
			done <- netns.Do(pod, func() error {
				for {
					select {
					case <-stop:
						return nil
					case <-time.After(200 * time.Millisecond):
						if !tt.send {
							own[tt.protocol]()
						}
					}
				}
			})
		}()
		q := egress.LiveQuestion{KernelQuestion: egress.KernelQuestion{Pod: livePod, IP: liveIP, ID: 7, To: liveTo, Protocol: tt.protocol, Port: tt.port}, Send: tt.send}
		began := time.Now()
		l, err := a.follow(t.Context(), q)
		took := time.Since(began)
		close(stop)
		if err := <-done; err != nil {
			t.Error(err)
		}
		sent, ok := l.Packet(egress.LiveSent, func(egress.LivePacket) bool { return true })
		if err != nil || l.Lost || l.Sent != tt.send || l.Unsent != "" || !ok || sent.In != "pod0" || sent.Out != "out0" || sent.Port == 0 || sent.Translated == 0 || tt.protocol == 6 && (sent.Translated < 600 || sent.Translated > 700) {
			t.Errorf("%s: %v, sent %+v", tt.name, err, l)
		}
		back, ok := l.Packet(egress.LiveBack, func(p egress.LivePacket) bool { return p.Port == sent.Translated })
		at, dropped := back.Dropped()
		if !ok || back.In != "out0" || back.Out != "pod0" || at.Chain != tt.back || dropped != (tt.back != "") {
			t.Errorf("%s: back %+v", tt.name, l)
		}
		if took > podTime {
			t.Errorf("%s: took %v", tt.name, took)
		}
	}
}

// Who may ask an agent would find out by the answers which pods, Services and nodes have which ports open.
func TestNothingIsSentInAPodsNameToWhatIsInTheCluster(t *testing.T) {
	netns.Enter(t)
	pod := fmt.Sprintf("eglive-p%d", os.Getpid())
	netns.Run(t, "ip netns add "+pod)
	t.Cleanup(func() { netns.Run(t, "ip netns del "+pod) })
	for _, line := range []string{
		"ip link add pod0 type veth peer name eth0 netns " + pod, "ip link set pod0 up", "ip addr add 10.244.0.1/24 dev pod0",
		"ip -n " + pod + " addr add 10.244.0.5/24 dev eth0", "ip -n " + pod + " link set eth0 up", "ip link set lo up",
		"ip link add out0 type bridge", "ip link set out0 up", "ip addr add 203.0.113.1/24 brd + dev out0",
		"sysctl -qw net.ipv4.ip_forward=1", "nft add table ip fw", "nft add chain ip fw c { type filter hook prerouting priority -400; }",
		"nft add rule ip fw c ip saddr 10.244.0.5 counter",
	} {
		netns.Run(t, line)
	}
	d := plan.Desired{NFT: nft.State{
		Pods: map[netip.Addr]egress.ID{livePod: 7}, Hosted: map[egress.ID]nft.Hosted{7: {IP: liveIP}},
		Except:  []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("203.0.113.7/32")},
		Sources: []netip.Addr{liveIP, netip.MustParseAddr("203.0.113.50")},
	}}
	a := &agent{kernel: &kernel{}}
	a.kernel.programmed.begin()(&d)
	ask := func(to string, within time.Duration) egress.Live {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		q := egress.KernelQuestion{Pod: livePod, IP: liveIP, ID: 7, To: netip.MustParseAddr(to), Protocol: 6, Port: 443}
		l, err := a.follow(ctx, egress.LiveQuestion{KernelQuestion: q, Send: true})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	for to, want := range map[string]string{
		"10.96.0.10": "10.96.0.0/12", "10.244.3.9": "10.244.0.0/16", "203.0.113.7": "203.0.113.7/32", "203.0.113.50": "an egress IP",
		"203.0.113.1": "no host outside", "203.0.113.255": "no host outside",
	} {
		if l := ask(to, 200*time.Millisecond); l.Sent || !strings.Contains(l.Unsent, want) || len(l.Packets) > 0 {
			t.Errorf("%s: %+v, want that nothing is sent, for %q", to, l, want)
		}
	}
	if out := netns.Run(t, "nft list chain ip fw c"); !strings.Contains(out, "packets 0 ") {
		t.Errorf("packets were sent:\n%s", out)
	}
	if l := ask("203.0.113.9", 10*time.Second); !l.Sent || l.Unsent != "" || len(l.Packets) != 1 {
		t.Errorf("to a host outside: %+v", l)
	}
}
