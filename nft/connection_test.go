package nft

import (
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// flow is one UDP connection to a server that answers with the source that it saw (space.serve).
type flow struct {
	t testing.TB
	net.Conn
}

// open opens a flow.
func (s space) open(ip string) flow {
	s.t.Helper()
	var c net.Conn
	s.do(func() (err error) { c, err = net.Dial("udp", net.JoinHostPort(ip, "7000")); return err })
	s.t.Cleanup(func() { c.Close() })
	return flow{s.t, c}
}

// seen sends a datagram and returns the source that the server saw; "" when no answer comes in time.
func (f flow) seen(within time.Duration) string {
	f.t.Helper()
	b := make([]byte, 100)
	f.SetDeadline(time.Now().Add(within))
	f.Write([]byte("?")) // what is lost shows as no answer
	n, _ := f.Read(b)
	return string(b[:n])
}

// want fails the test unless the server sees the source; "": no datagram. What is to come may take long where much else
// runs.
func (f flow) want(source, when string) {
	f.t.Helper()
	within := 3 * time.Second
	if source == "" {
		within /= 10
	}
	if got := f.seen(within); got != source {
		f.t.Errorf("%s: source %q, want %q", when, got, source)
	}
}

// Another program writes connection marks, as those do that keep their own there: the packets that are no more known to
// be an egress's must not leave as the CNI has it. What others open to the pod goes on.
func TestAConnectionThatLostItsMarkDoesNotLeave(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ext.serve(f.server, f.lan)
			// so that an answer to the pod's own address comes back, and shows
			ext.run("ip route add " + f.pod + " via " + f.node)
			f.addEgressIP(t)
			reach(t, tables, parseState(t, f.base()+"pod "+f.pod+" 5\nnexthop 5 0x3fff\nhosted 5 "+f.egress+" 0x3fff\n"))
			if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			marked, excepted := p.open(f.server), p.open(f.lan)
			marked.want(f.egress, "marked")
			excepted.want(f.node, "to an excepted destination")
			netns.Run(t, fmt.Sprintf("conntrack -U --orig-src %s -m 1", f.pod))
			counts(t, tables, CounterUnmarked, func() { marked.want("", "the mark is another") })
			excepted.want(f.node, "to an excepted destination, marked by another program")
			p.open(f.server).want(f.egress, "the next connection")

			// A port of the node leads to the pod: its answers are part of a connection that is none of ours.
			p.serve(f.pod)
			nft(t, fmt.Sprintf("table inet service { chain pre { type nat hook prerouting priority -100; "+
				"%s daddr %s udp dport 7000 dnat to %s; }; }", map[bool]string{true: "ip", false: "ip6"}[f.egressIP().Is4()], f.node, f.pod))
			opened := ext.open(f.node)
			opened.want(f.lan, "a port of the node that leads to the pod")
			netns.Run(t, fmt.Sprintf("conntrack -U --orig-dst %s -m 1", f.node))
			opened.want(f.lan, "the same, marked by another program")
		})
	}
}

// IPVS chooses the endpoint of a Service when the packet is delivered to the node, and sends it as the node sends its
// own: with the pod's address. A socket that has this address does the same.
func TestAServiceThatChoosesItsEndpointLateDoesNotLeave(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext := outside(t)
			pod(t)
			arrives := func(to string) bool {
				t.Helper()
				var s net.PacketConn
				ext.do(func() (err error) { s, err = net.ListenPacket("udp", net.JoinHostPort(to, "7000")); return err })
				defer s.Close()
				c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(f.pod)}, Control: transparent}).Dial("udp", net.JoinHostPort(to, "7000"))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				c.Write([]byte("?")) // what is lost shows as nothing that arrives
				s.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				_, _, err = s.ReadFrom(make([]byte, 10))
				return err == nil
			}
			reach(t, tables, parseState(t, f.base()))
			if !arrives(f.server) {
				t.Fatal("not selected: nothing arrives")
			}
			reach(t, tables, parseState(t, f.base()+"pod "+f.pod+" 5\nnexthop 5 0x3fff\n"))
			if !arrives(f.lan) {
				t.Error("an excepted destination is not reached")
			}
			for _, track := range []string{"", "notrack"} { // as with the sysctl net.ipv4.vs.conntrack, and without
				nft(t, "table inet vs { chain out { type filter hook output priority -300; udp dport 7000 counter "+track+"; }; }")
				counts(t, tables, CounterUnmarked, func() {
					if arrives(f.server) {
						t.Errorf("%q: a datagram of the pod arrives", track)
					}
				})
			}
		})
	}
}

func transparent(network, _ string, c syscall.RawConn) error {
	var set error
	err := c.Control(func(fd uintptr) {
		level, option := unix.SOL_IP, unix.IP_TRANSPARENT
		if network == "udp6" {
			level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
		}
		set = unix.SetsockoptInt(int(fd), level, option, 1)
	})
	if err == nil {
		err = set
	}
	return err
}

// A pod that is no longer selected, one that another egress selects, and one that gets the address of such a pod: a
// flow that is open goes on with no egress IP but that of the pod that sends it now.
func TestAnOpenFlowDoesNotKeepAnEgressIPThatItsPodHasNoMore(t *testing.T) {
	for i, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ext.serve(f.server)
			f.addEgressIP(t)
			other := sides{egress: []string{"10.10.0.9", "fd10::9"}[i]} // of id 6
			other.addEgressIP(t)
			hosted := f.base() + fmt.Sprintf("nexthop 5 0x3fff\nhosted 5 %s 0x3fff\nnexthop 6 0x3fff\nhosted 6 %s 0x3fff\n", f.egress, other.egress)
			state := func(lines string) {
				t.Helper()
				reach(t, tables, parseState(t, hosted+lines))
				if err := tables.Permit([]Permit{{f.egressIP(), true}, {netip.MustParseAddr(other.egress), true}}, time.Hour); err != nil {
					t.Fatal(err)
				}
			}
			state("pod " + f.pod + " 5\n")
			c := p.open(f.server)
			c.want(f.egress, "selected")
			state("")
			counts(t, tables, CounterNoNextHop, func() { c.want("", "no longer selected") })
			state("pod " + f.pod + " 6\n")
			counts(t, tables, CounterNoNextHop, func() { c.want("", "selected by another egress") })
			netns.Run(t, "conntrack -D --orig-src "+f.pod)
			c.want(other.egress, "opened anew")
			state("pod " + f.pod + " 5\n")
			counts(t, tables, CounterNoNextHop, func() { c.want("", "selected by the former egress again") })
		})
	}
}
