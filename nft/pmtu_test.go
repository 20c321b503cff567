package nft

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// A pod's own link may carry less than the overlay: an answer that is too large for it is told so, in the name of the
// egress IP, or else it never arrives.
func TestAnswersTooLargeForThePodsLinkGetAnICMPError(t *testing.T) {
	t.Run("its own node is the gateway", func(t *testing.T) {
		tables := open(t)
		ext, p := outside(t), pod(t)
		state := "mtu 1450\n"
		for i, f := range bothSides {
			f.addEgressIP(t)
			state += f.base() + fmt.Sprintf("pod %s %d\nnexthop %[2]d 0x3fff\nhosted %[2]d %s 0x3fff\n", f.pod, 5+i, f.egress)
		}
		reach(t, tables, parseState(t, state))
		for _, f := range bothSides {
			if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			answersFit(t, f, ext, p, setMTU(t, p))
		}
	})
	t.Run("another node is the gateway", func(t *testing.T) {
		tables, far, ext, p, _ := remote(t)
		hosts, pods := "mtu 1450\nself 10.11.0.102\nnode 10.11.0.101\n", "mtu 1450\nself 10.11.0.101\nnode 10.11.0.102\n"
		var permits []Permit
		for i, f := range bothSides {
			hosts += f.atGateway(5+i, underlays[0])
			pods += f.atPod(5+i, underlays[1])
			permits = append(permits, Permit{IP: f.egressIP()})
		}
		reach(t, tables, parseState(t, pods))
		reach(t, far, parseState(t, hosts))
		if err := far.Permit(permits, time.Hour); err != nil {
			t.Fatal(err)
		}
		for _, f := range bothSides {
			answersFit(t, f, ext, p, setMTU(t, p))
		}
	})
}

const (
	podMTU    = 1300
	answerLen = 1400 // bytes of payload: with headers no more than the overlay takes
)

// answersFit has the pod ask, by UDP and by TCP, before its link becomes small, by setMTU, and the server answer
// afterwards.
func answersFit(t *testing.T, f sides, ext, p space, setMTU func(mtu int)) {
	t.Helper()
	setMTU(1500)
	ext.run("ip route flush cache")
	ext.run("ip -6 route flush cache")
	errors := ext.icmpErrors(f)

	// The UDP server does as most do: its datagrams may be fragmented where they come from.
	var s net.PacketConn
	var l net.Listener
	ext.do(func() (err error) {
		if s, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7010")); err == nil {
			l, err = net.Listen("tcp", net.JoinHostPort(f.server, "7010"))
		}
		return err
	})
	defer s.Close()
	defer l.Close()
	var c, stream net.Conn
	p.do(func() (err error) {
		if c, err = net.Dial("udp", net.JoinHostPort(f.server, "7010")); err == nil {
			stream, err = net.DialTimeout("tcp", net.JoinHostPort(f.server, "7010"), 3*time.Second)
		}
		return err
	})
	defer c.Close()
	defer stream.Close()
	c.Write([]byte("?"))
	s.SetReadDeadline(time.Now().Add(time.Second))
	_, client, err := s.ReadFrom(make([]byte, 10))
	if err != nil {
		t.Fatal(err)
	}
	if got := netip.MustParseAddrPort(client.String()).Addr().Unmap(); got != f.egressIP() {
		t.Errorf("source %s, want %s", got, f.egress)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()

	setMTU(podMTU)
	arrives := func() bool {
		s.WriteTo(make([]byte, answerLen), client) // what is lost shows as nothing that arrives
		c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		n, _ := c.Read(make([]byte, 2000))
		return n == answerLen
	}
	if arrives() {
		t.Fatal("the first large answer arrives: the link is not small")
	}
	select {
	case got := <-errors:
		if want := fmt.Sprintf("from %s about %s to %[1]s", f.egress, f.server); got != want {
			t.Errorf("the server is told %q, want %q", got, want)
		}
	case <-time.After(time.Second):
		t.Error("the server is told nothing")
	}
	if out := ext.out("ip route get " + f.egress); !strings.Contains(out, fmt.Sprint("mtu ", podMTU)) {
		t.Errorf("the server's way to the egress IP: %s", out)
	}
	if !arrives() {
		t.Error("the next large answer does not arrive either")
	}

	// TCP has the MSS of before.
	go accepted.Write(make([]byte, 20*answerLen)) // what is lost shows as nothing that arrives
	stream.SetReadDeadline(time.Now().Add(3 * time.Second))
	if n, err := io.ReadFull(stream, make([]byte, 20*answerLen)); err != nil {
		t.Errorf("of a stream %d bytes arrive: %v", n, err)
	}
}

// setMTU returns what sets the MTU of the link of a pod of this node.
func setMTU(t *testing.T, p space) func(mtu int) {
	return func(mtu int) {
		t.Helper()
		netns.Run(t, fmt.Sprint("ip link set cni0 mtu ", mtu))
		p.run(fmt.Sprint("ip link set eth0 mtu ", mtu))
	}
}

// out runs a command in the namespace and returns what it prints.
func (s space) out(line string) string {
	s.t.Helper()
	return netns.Run(s.t, "ip netns exec "+s.name+" "+line)
}

// icmpErrors hears what the namespace is told of packets that were too large: by whom, and about which packet.
func (s space) icmpErrors(f sides) <-chan string {
	s.t.Helper()
	network, protocol, headerLen, source := "ip4:icmp", 1, 20, 12
	if !f.egressIP().Is4() {
		network, protocol, headerLen, source = "ip6:58", 58, 40, 8
	}
	var c net.PacketConn
	s.do(func() (err error) {
		c, err = net.ListenPacket(network, map[bool]string{true: "0.0.0.0", false: "::"}[headerLen == 20])
		return err
	})
	s.t.Cleanup(func() { c.Close() })
	heard := make(chan string, 10)
	go func() {
		for b := make([]byte, 2000); ; {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return // closed
			}
			m, err := icmp.ParseMessage(protocol, b[:n])
			if err != nil {
				continue
			}
			var inner []byte
			switch body := m.Body.(type) {
			case *icmp.DstUnreach:
				inner = body.Data
			case *icmp.PacketTooBig:
				inner = body.Data
			}
			if size := f.egressIP().BitLen() / 8; len(inner) >= headerLen {
				about, _ := netip.AddrFromSlice(inner[source : source+size])
				to, _ := netip.AddrFromSlice(inner[source+size : source+2*size])
				select {
				case heard <- fmt.Sprintf("from %s about %s to %s", from, about, to):
				default:
				}
			}
		}
	}()
	return heard
}

// A pod that sends as much as its own end of the link takes is told by the server's SYN what the node's end takes.
func TestTheMSSFollowsThePodsLink(t *testing.T) {
	tables := open(t)
	ext, p := outside(t), pod(t)
	netns.Run(t, fmt.Sprint("ip link set cni0 mtu ", podMTU)) // and the pod's end stays at 1500
	for i, f := range bothSides {
		f.addEgressIP(t)
		id := 5 + i
		reach(t, tables, parseState(t, f.base()+fmt.Sprintf("mtu 1450\npod %s %d\nnexthop %[2]d 0x3fff\nhosted %[2]d %s 0x3fff\n", f.pod, id, f.egress)))
		if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
			t.Fatal(err)
		}
		var l net.Listener
		ext.do(func() (err error) { l, err = net.Listen("tcp", net.JoinHostPort(f.server, "7010")); return err })
		defer l.Close()
		p.do(func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(f.server, "7010"), 3*time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			size, err := segmentSize(c)
			if most := podMTU - 40 - 20*i; size > most {
				t.Errorf("%s: the pod sends segments of %d bytes, want at most %d", f.pod, size, most)
			}
			return err
		})
	}
}

// segmentSize returns how many bytes of data the kernel puts into a segment of a TCP connection.
func segmentSize(c net.Conn) (bytes int, err error) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	refused := raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			bytes = int(info.Snd_mss)
		}
	})
	return bytes, errors.Join(refused, err)
}
