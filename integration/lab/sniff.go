package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Packet is an IPv4 or IPv6 packet that came to the outside host, or that it sent.
type Packet struct {
	Time     time.Time // when the kernel got it
	Src, Dst netip.Addr
	Protocol uint8 // IANA number; of IPv6 the first next header
	// SrcPort and DstPort are 0 but for TCP and UDP, and for fragments after the first.
	SrcPort, DstPort uint16
	Reset            bool // a TCP segment with the flag RST
	SrcMAC           [6]byte
}

// ARP is an ARP packet for IPv4 over Ethernet (RFC 826) that came to a port of the LAN's bridge.
type ARP struct {
	Time time.Time // when the kernel got it
	// Port is where it came from: to-<host>.
	Port string
	// Operation is 1 for a request, 2 for a reply. An announcement may be either, with SenderIP and TargetIP equal.
	Operation          uint16
	SenderIP, TargetIP netip.Addr
	SenderMAC          [6]byte
}

// NDP is a neighbor solicitation or advertisement (RFC 4861) that came to a port of the LAN's bridge.
type NDP struct {
	Time time.Time // when the kernel got it
	// Port is where it came from: to-<host>.
	Port string
	Type uint8 // of ICMPv6: 135 is a solicitation, 136 an advertisement
	// IP is the address whose link-layer address it has: the source of a solicitation, the target of an advertisement.
	// MAC is that of the frame.
	IP  netip.Addr
	MAC [6]byte
}

// String prints the packet as tcpdump does, more or less.
func (p Packet) String() string {
	return fmt.Sprintf("%s %v > %v protocol %d from %v", p.Time.Format("15:04:05.000000"),
		netip.AddrPortFrom(p.Src, p.SrcPort), netip.AddrPortFrom(p.Dst, p.DstPort), p.Protocol, net.HardwareAddr(p.SrcMAC[:]))
}

// String prints who says what, and where.
func (a ARP) String() string {
	return fmt.Sprintf("%s %s: operation %d, %v is at %v, to %v", a.Time.Format("15:04:05.000000"), a.Port, a.Operation, a.SenderIP,
		net.HardwareAddr(a.SenderMAC[:]), a.TargetIP)
}

// String prints who says what, and where.
func (n NDP) String() string {
	return fmt.Sprintf("%s %s: ICMPv6 type %d, %v is at %v", n.Time.Format("15:04:05.000000"), n.Port, n.Type, n.IP, net.HardwareAddr(n.MAC[:]))
}

// Sniffer captures into memory until it is stopped. Its methods may be called at any time, from several goroutines.
type Sniffer struct {
	fd   int
	host *host
	quit context.CancelFunc
	done chan struct{}

	mu      sync.Mutex // guards what is below
	packets []Packet
	arps    []ARP
	ndps    []NDP
	ports   map[int]string // by interface index
	err     error
}

// Sniff starts a capture of what arrives: "outside", every IPv4 and IPv6 packet that comes to the outside host from the
// LAN; "lan", every ARP packet, neighbor solicitation and advertisement that comes to the LAN's bridge, whatever port,
// once; "resets", every TCP segment with RST that the outside host gets or sends. It captures from its return on, until
// Stop or the end of ctx.
func (l *Lab) Sniff(ctx context.Context, where string) (*Sniffer, error) {
	if where != "outside" && where != "lan" && where != "resets" {
		return nil, fmt.Errorf("sniffing %q: want outside, lan or resets", where)
	}
	at := where
	if where == "resets" {
		at = "outside"
	}
	h, err := l.openHost(at)
	if err != nil {
		return nil, err
	}
	s := &Sniffer{fd: -1, host: h, done: make(chan struct{}), ports: map[int]string{}}
	if err := inNetns(l.netns(at), func() error { return s.open(where) }); err != nil {
		h.close()
		return nil, fmt.Errorf("sniffing %s: %w", where, err)
	}
	ctx, s.quit = context.WithCancel(ctx)
	go s.run(ctx)
	return s, nil
}

// open makes the packet socket (packet(7)) in the namespace of the calling thread.
func (s *Sniffer) open(where string) error {
	// protocol 0: nothing arrives before bind
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	addr := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL)}
	if where == "lan" {
		// All ports at once (ifindex 0), those of nodes that boot later too. ETH_P_ARP would not do: its taps come
		// after the bridge has taken the packet.
		err = attach(fd, neighborFilter)
	} else {
		var link *net.Interface
		if link, err = net.InterfaceByName(hostLink); err == nil {
			addr.Ifindex = link.Index
		}
	}
	if where == "resets" {
		err = errors.Join(err, attach(fd, resetFilter))
	} else {
		// what the namespace's own links send is what another has received, or of no interest
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	}
	err = errors.Join(err,
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		// seconds of a flood, should this process not get to run
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
	)
	if err == nil {
		err = unix.Bind(fd, addr)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	s.fd = fd
	return nil
}

// neighborFilter lets only ARP and what parseNDP reads through.
var neighborFilter = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 12, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_ARP, SkipTrue: 6},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IPV6, SkipFalse: 6},
	bpf.LoadAbsolute{Off: ethernetHeader + 6, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_ICMPV6, SkipFalse: 4},
	bpf.LoadAbsolute{Off: ethernetHeader + 40, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: neighborSolicitation, SkipTrue: 1},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: neighborAdvertisement, SkipFalse: 1},
	bpf.RetConstant{Val: 0xffff},
	bpf.RetConstant{Val: 0},
}

// resetFilter lets only TCP segments with RST through (RFC 9293, section 3.1: bit 2 of byte 13). A reset has no payload
// and is no fragment.
var resetFilter = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 12, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IPV6, SkipTrue: 5},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IP, SkipFalse: 9},
	bpf.LoadAbsolute{Off: ethernetHeader + 9, Size: 1},
	bpf.LoadMemShift{Off: ethernetHeader}, // X: the length of the IPv4 header
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipFalse: 6},
	bpf.Jump{Skip: 3},
	bpf.LoadAbsolute{Off: ethernetHeader + 6, Size: 1},
	bpf.LoadConstant{Dst: bpf.RegX, Val: 40},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipFalse: 2},
	bpf.LoadIndirect{Off: ethernetHeader + 13, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 4, SkipTrue: 1},
	bpf.RetConstant{Val: 0},
	bpf.RetConstant{Val: 0xffff},
}

// attach lets only the frames through to a packet socket that a filter lets through.
func attach(fd int, program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return err
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, in := range raw {
		filter[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// run takes packets until ctx ends, and then those that had arrived by then.
func (s *Sniffer) run(ctx context.Context) {
	defer close(s.done)
	buf, oob := make([]byte, 256), make([]byte, 128) // the headers are enough
	for {
		n, oobn, _, from, err := unix.Recvmsg(s.fd, buf, oob, unix.MSG_DONTWAIT)
		switch {
		case err == nil:
			if ll, ok := from.(*unix.SockaddrLinklayer); ok {
				s.take(buf[:n], timestamp(oob[:oobn]), ll.Ifindex)
			}
		case errors.Is(err, unix.EAGAIN):
			if ctx.Err() != nil {
				return
			}
			// 20 ms: the longest that Stop waits
			unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, 20) // an error ends as a try too many
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN):
		default:
			s.mu.Lock()
			s.err = err
			s.mu.Unlock()
			return
		}
	}
}

// timestamp returns the kernel's time of a packet (SO_TIMESTAMPNS, socket(7)).
func timestamp(oob []byte) time.Time {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err == nil {
		for _, m := range msgs {
			if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS && len(m.Data) >= 16 {
				return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
			}
		}
	}
	return time.Now()
}

// take records one frame.
func (s *Sniffer) take(frame []byte, at time.Time, ifindex int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a, ok := parseARP(frame); ok {
		a.Time, a.Port = at, s.port(ifindex)
		if a.Port != bridgeLink { // a broadcast comes to the bridge's own link after its port
			s.arps = append(s.arps, a)
		}
	}
	if n, ok := parseNDP(frame); ok {
		n.Time, n.Port = at, s.port(ifindex)
		if n.Port != bridgeLink {
			s.ndps = append(s.ndps, n)
		}
	}
	if p, ok := parsePacket(frame); ok {
		p.Time = at
		s.packets = append(s.packets, p)
	}
}

// port returns the name of a link. The caller holds mu.
func (s *Sniffer) port(ifindex int) string {
	name, ok := s.ports[ifindex]
	if !ok {
		name = fmt.Sprintf("link %d", ifindex) // gone already
		if link, err := s.host.nl.LinkByIndex(ifindex); err == nil {
			name = link.Attrs().Name
		}
		s.ports[ifindex] = name
	}
	return name
}

// Packets returns what was captured so far of the outside host, in order of arrival.
func (s *Sniffer) Packets() []Packet {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.packets)
}

// TakePackets returns what was captured outside since it was last called, in order of arrival, and forgets it.
func (s *Sniffer) TakePackets() []Packet {
	s.mu.Lock()
	defer s.mu.Unlock()
	packets := s.packets
	s.packets = nil
	return packets
}

// ARPs returns what was captured so far on the LAN, in order of arrival.
func (s *Sniffer) ARPs() []ARP {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.arps)
}

// NDPs returns what was captured so far on the LAN, in order of arrival.
func (s *Sniffer) NDPs() []NDP {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ndps)
}

// Stop ends the capture; what arrived before is still taken. An error means that the capture is not whole. It may be
// called once.
func (s *Sniffer) Stop() error {
	s.quit()
	<-s.done
	stats, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err == nil && stats.Drops > 0 {
		err = fmt.Errorf("the kernel dropped %d packets", stats.Drops)
	}
	err = errors.Join(s.err, err, unix.Close(s.fd))
	s.host.close()
	if err != nil {
		return fmt.Errorf("sniffing %s: %w", s.host.name, err)
	}
	return nil
}
