package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/ndp"
	"golang.org/x/sys/unix"
)

// Ask asks for addresses from the outside host, by broadcast ARP request or multicast neighbor solicitation, each one
// every interval, until ctx ends. The answers are for a Sniffer on the LAN: the outside host's own tables stay as they
// are.
func (l *Lab) Ask(ctx context.Context, interval time.Duration, ips ...netip.Addr) error {
	frames := make([][]byte, len(ips))
	for i, ip := range ips {
		var err error
		if frames[i], err = question(ip); err != nil {
			return fmt.Errorf("asking for %s: %w", ip, err)
		}
	}
	fd, to := -1, unix.SockaddrLinklayer{}
	err := inNetns(l.netns("outside"), func() error {
		link, err := net.InterfaceByName(hostLink)
		if err != nil {
			return err
		}
		to.Ifindex = link.Index
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("opening a socket at the outside host: %w", err)
	}
	defer unix.Close(fd)
	for {
		for _, frame := range frames {
			if err := unix.Sendto(fd, frame, 0, &to); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return fmt.Errorf("asking from the outside host: %w", err)
			}
		}
		if sleep(ctx, interval) != nil {
			return nil
		}
	}
}

// question returns the frame that asks for the link-layer address of ip in the outside host's name.
func question(ip netip.Addr) ([]byte, error) {
	own := mac(families()[0].host(outsideHost))
	if ip.Is4() {
		p, err := arp.NewPacket(arp.OperationRequest, own, families()[0].host(outsideHost), ethernet.Broadcast, ip)
		if err != nil {
			return nil, err
		}
		b, err := p.MarshalBinary()
		if err != nil {
			return nil, err
		}
		return (&ethernet.Frame{Destination: ethernet.Broadcast, Source: own, EtherType: ethernet.EtherTypeARP, Payload: b}).MarshalBinary()
	}
	fs := families()
	src := fs[len(fs)-1].host(outsideHost)
	dst, err := ndp.SolicitedNodeMulticast(ip)
	if err != nil {
		return nil, err
	}
	message, err := ndp.MarshalMessageChecksum(&ndp.NeighborSolicitation{
		TargetAddress: ip, Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: own}},
	}, src, dst)
	if err != nil {
		return nil, err
	}
	// RFC 8200, section 3; the hop limit is RFC 4861's, section 7.1.1
	header := []byte{0x60, 0, 0, 0, 0, byte(len(message)), unix.IPPROTO_ICMPV6, 255}
	packet := append(append(append(header, src.AsSlice()...), dst.AsSlice()...), message...)
	group := dst.As16()
	to := net.HardwareAddr{0x33, 0x33, group[12], group[13], group[14], group[15]} // RFC 2464, section 7
	return (&ethernet.Frame{Destination: to, Source: own, EtherType: ethernet.EtherTypeIPv6, Payload: packet}).MarshalBinary()
}
