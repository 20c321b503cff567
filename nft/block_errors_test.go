package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	xipv4 "golang.org/x/net/ipv4"
	xipv6 "golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// toldOf is an ICMP error as it comes to a host: what it says, by whom, and about which packet.
type toldOf struct {
	kind     icmp.Type
	code     int
	by       netip.Addr
	from, to netip.AddrPort
}

// headerLen is the length of an IP header without options.
func (f sides) headerLen() int {
	if f.egressIP().Is4() {
		return xipv4.HeaderLen
	}
	return xipv6.HeaderLen
}

// icmpNetwork is what a raw socket for ICMP is made by, and the number of the protocol.
func (f sides) icmpNetwork() (network string, protocol int) {
	if f.egressIP().Is4() {
		return "ip4:icmp", unix.IPPROTO_ICMP
	}
	return "ip6:ipv6-icmp", unix.IPPROTO_ICMPV6
}

// hearsErrors returns what a host is told of its packets from now on.
func (b *blockSite) hearsErrors(s space) <-chan toldOf {
	b.t.Helper()
	network, protocol := b.f.icmpNetwork()
	var c net.PacketConn
	s.do(func() (err error) { c, err = net.ListenPacket(network, ""); return err })
	b.t.Cleanup(func() { c.Close() })
	heard := make(chan toldOf, 100)
	go func() {
		for buf := make([]byte, 2000); ; {
			n, by, err := c.ReadFrom(buf)
			if err != nil {
				return // closed
			}
			m, err := icmp.ParseMessage(protocol, buf[:n])
			if err != nil {
				continue
			}
			var inner []byte
			switch body := m.Body.(type) {
			case *icmp.DstUnreach:
				inner = body.Data
			case *icmp.TimeExceeded:
				inner = body.Data
			case *icmp.PacketTooBig:
				inner = body.Data
			default:
				continue
			}
			h, size := b.f.headerLen(), b.f.egressIP().BitLen()/8
			if len(inner) < h+4 {
				continue
			}
			end := func(address, port int) netip.AddrPort {
				ip, _ := netip.AddrFromSlice(inner[address : address+size])
				return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(inner[port:]))
			}
			heard <- toldOf{m.Type, m.Code, netip.MustParseAddr(by.String()), end(h-2*size, h), end(h-size, h+2)}
		}
	}()
	return heard
}

// tell sends an ICMP error about a UDP packet from the host, as a router behind the gateway would.
func (b *blockSite) tell(s space, to string, kind icmp.Type, code, mtu int, about, dest netip.AddrPort) {
	b.t.Helper()
	network, protocol := b.f.icmpNetwork()
	ip := make([]byte, b.f.headerLen(), 60)
	const payload = 1400
	if b.f.egressIP().Is4() {
		ip[0], ip[8], ip[9] = 0x45, 60, unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+8+payload))
		ip[6] = 0x40 // DF
		copy(ip[12:], about.Addr().AsSlice())
		copy(ip[16:], dest.Addr().AsSlice())
	} else {
		ip[0], ip[6], ip[7] = 0x60, unix.IPPROTO_UDP, 60
		binary.BigEndian.PutUint16(ip[4:], 8+payload)
		copy(ip[8:], about.Addr().AsSlice())
		copy(ip[24:], dest.Addr().AsSlice())
	}
	for _, n := range []uint16{about.Port(), dest.Port(), 8 + payload, 0} {
		ip = binary.BigEndian.AppendUint16(ip, n)
	}
	// struct icmphdr: type, code, checksum, and what the type has in the last four bytes
	var number int
	switch k := kind.(type) {
	case xipv4.ICMPType:
		number = int(k)
	case xipv6.ICMPType:
		number = int(k)
	}
	message := append([]byte{byte(number), byte(code), 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, ip...)
	if protocol == unix.IPPROTO_ICMP { // the kernel does it for the other one
		binary.BigEndian.PutUint16(message[2:], checksum(message))
	}
	s.do(func() error {
		c, err := net.Dial(network, to)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(message)
		return err
	})
}

// datagrams opens a UDP socket of a pod to a port of the server, and one of the server, and returns both, and where
// the server sees the pod.
func (b *blockSite) datagrams(pod string, port int) (c *net.UDPConn, s *net.UDPConn, seen netip.AddrPort) {
	b.t.Helper()
	b.ext.do(func() (err error) {
		s, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(b.f.server), uint16(port))))
		return err
	})
	b.t.Cleanup(func() { s.Close() })
	b.pods[pod].do(func() (err error) {
		d, err := net.Dial("udp", net.JoinHostPort(b.f.server, strconv.Itoa(port)))
		if err == nil {
			c = d.(*net.UDPConn)
		}
		return err
	})
	b.t.Cleanup(func() { c.Close() })
	eventually(b.t, "no datagram arrives", func() bool {
		_, _ = c.Write([]byte("?")) // what is lost shows as nothing that arrives
		if err := s.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			b.t.Fatal(err)
		}
		_, from, err := s.ReadFromUDPAddrPort(make([]byte, 10))
		seen = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		return err == nil
	})
	return c, s, seen
}

// What is said of a pod's packet is about the packet that the pod sent, whoever says it.
func TestByABlockErrorsAboutAPodsPacketsAreAboutWhatItSent(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			for name, gateway := range gateways() {
				t.Run(name, func(t *testing.T) {
					b.moveTo(gateway)
					b.output(b.nodes[2].space, "conntrack -F")
					c, _, seen := b.datagrams("c", 7020+gateway)
					b.inBlock("pod c", seen, 2)
					own := netip.AddrPortFrom(b.podAddress("c"), netip.MustParseAddrPort(c.LocalAddr().String()).Port())
					server := netip.AddrPortFrom(netip.MustParseAddr(f.server), uint16(7020+gateway))
					heard := b.hearsErrors(b.pods["c"])
					type said struct {
						kind icmp.Type
						code int
					}
					all := []said{{xipv4.ICMPTypeDestinationUnreachable, 1}, {xipv4.ICMPTypeDestinationUnreachable, 3}, {xipv4.ICMPTypeDestinationUnreachable, 13},
						{xipv4.ICMPTypeTimeExceeded, 0}, {xipv4.ICMPTypeDestinationUnreachable, 4}}
					if !f.egressIP().Is4() {
						all = []said{{xipv6.ICMPTypeDestinationUnreachable, 0}, {xipv6.ICMPTypeDestinationUnreachable, 4}, {xipv6.ICMPTypeTimeExceeded, 0},
							{xipv6.ICMPTypePacketTooBig, 0}}
					}
					for _, is := range all {
						b.tell(b.ext, f.egress, is.kind, is.code, 1300, seen, server)
						select {
						case got := <-heard:
							if got.by = (netip.Addr{}); got != (toldOf{kind: is.kind, code: is.code, from: own, to: server}) {
								t.Errorf("the pod is told %+v, want %v, %d of %s to %s", got, is.kind, is.code, own, server)
							}
						case <-time.After(2 * time.Second):
							t.Errorf("the pod is not told %v, %d", is.kind, is.code)
						}
					}
					// the last one says how much the way takes
					eventually(t, "the pod takes the MTU of the way for another than 1300", func() bool { return pathMTU(t, c) == 1300 })
				})
				b.pods["c"].run("ip route flush cache\nip -6 route flush cache")
			}
		})
	}
}

// What a pod, or its node, says of a server's packet is about the packet that the server sent.
func TestByABlockErrorsAboutAServersPacketsAreAboutWhatItSent(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			for name, gateway := range gateways() {
				t.Run(name, func(t *testing.T) {
					b.moveTo(gateway)
					b.output(b.nodes[2].space, "conntrack -F")
					c, s, seen := b.datagrams("c", 7020+gateway)
					server := netip.AddrPortFrom(netip.MustParseAddr(f.server), uint16(7020+gateway))
					heard := b.hearsErrors(b.ext)
					is := func(what string, kind icmp.Type, code int) {
						t.Helper()
						select {
						case got := <-heard:
							by := got.by
							if got.by = (netip.Addr{}); got != (toldOf{kind: kind, code: code, from: server, to: seen}) {
								t.Errorf("%s: the server is told %+v, want %v, %d of %s to %s", what, got, kind, code, server, seen)
							}
							for _, p := range []string{"a", "b", "c"} {
								if by == b.podAddress(p) {
									t.Errorf("%s: the address of a pod, %s, is seen outside", what, by)
								}
							}
						case <-time.After(2 * time.Second):
							t.Errorf("%s: the server is told nothing", what)
						}
					}
					kind := func(ipv4 xipv4.ICMPType, ipv6 xipv6.ICMPType) icmp.Type {
						if f.egressIP().Is4() {
							return ipv4
						}
						return ipv6
					}
					hops := map[int]int{2: 1, 3: 2}[gateway] // to the pod's node
					for ttl := 1; ttl <= hops; ttl++ {
						if err := setTTL(s, ttl, f); err != nil {
							t.Fatal(err)
						}
						if _, err := s.WriteToUDPAddrPort([]byte("!"), seen); err != nil {
							t.Fatal(err)
						}
						is(fmt.Sprintf("its hops end at node %d of %d", ttl, hops), kind(xipv4.ICMPTypeTimeExceeded, xipv6.ICMPTypeTimeExceeded), 0)
					}
					if err := setTTL(s, 64, f); err != nil {
						t.Fatal(err)
					}
					c.Close()
					if _, err := s.WriteToUDPAddrPort([]byte("!"), seen); err != nil {
						t.Fatal(err)
					}
					is("nobody listens any more", kind(xipv4.ICMPTypeDestinationUnreachable, xipv6.ICMPTypeDestinationUnreachable), map[bool]int{true: 3, false: 4}[f.egressIP().Is4()])
				})
			}
		})
	}
}

// option sets an option of IP of a socket.
func option(c *net.UDPConn, f sides, ipv4, ipv6, value int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	level, name := unix.IPPROTO_IP, ipv4
	if !f.egressIP().Is4() {
		level, name = unix.IPPROTO_IPV6, ipv6
	}
	refused := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, name, value) })
	return errors.Join(refused, err)
}

func setTTL(c *net.UDPConn, ttl int, f sides) error {
	return option(c, f, unix.IP_TTL, unix.IPV6_UNICAST_HOPS, ttl)
}

// pathMTU returns the MTU of the way that a connected socket has, as its host knows it.
func pathMTU(t *testing.T, c *net.UDPConn) (mtu int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	refused := raw.Control(func(fd uintptr) {
		if mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU); err != nil {
			mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU)
		}
	})
	if err := errors.Join(refused, err); err != nil {
		t.Fatal(err)
	}
	return mtu
}

// A datagram that fills a link of 1,500 bytes, 1,472 of payload with IPv4, and must not be fragmented, arrives where no
// overlay is on its way. Where one is, who sends it is told what that takes, and what takes no more arrives.
func TestByABlockDatagramsThatMustNotBeFragmentedFindTheMTU(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			for name, gateway := range gateways() {
				t.Run(name, func(t *testing.T) {
					b.moveTo(gateway)
					b.output(b.nodes[2].space, "conntrack -F")
					mtu := map[int]int{2: 1500, 3: 1450}[gateway]
					headers := f.headerLen() + 8
					c, s, seen := b.datagrams("c", 7020+gateway)
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					var back *net.UDPConn // of the server, to where it sees the pod: that one's MTU can be asked for
					b.ext.do(func() (err error) {
						own := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(f.server), uint16(7020+gateway)))
						back, err = net.DialUDP("udp", own, net.UDPAddrFromAddrPort(seen))
						return err
					})
					defer back.Close()
					for who, ends := range map[string]struct{ from, to *net.UDPConn }{"the pod": {c, back}, "the server": {back, c}} {
						if err := option(ends.from, f, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO); err != nil {
							t.Fatal(err)
						}
						arrives := func(payload int) bool {
							_, _ = ends.from.Write(make([]byte, payload)) // EMSGSIZE, once it is known
							if err := ends.to.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
								t.Fatal(err)
							}
							n, _ := ends.to.Read(make([]byte, 2000))
							return n == payload
						}
						if whole := 1500 - headers; mtu < 1500 && arrives(whole) {
							t.Errorf("%s sends %d bytes, and they arrive", who, whole)
						}
						eventually(t, fmt.Sprintf("%s takes the MTU for another than %d", who, mtu), func() bool { return pathMTU(t, ends.from) == mtu })
						// the socket says first that the one before was too large
						eventually(t, fmt.Sprintf("%s sends %d bytes, and they do not arrive", who, mtu-headers), func() bool { return arrives(mtu - headers) })
						if arrives(mtu - headers + 1) {
							t.Errorf("%s sends a byte more, and it arrives", who)
						}
					}
				})
				for _, s := range []space{b.pods["c"], b.ext} {
					s.run("ip route flush cache\nip -6 route flush cache")
				}
			}
		})
	}
}
