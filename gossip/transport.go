package gossip

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/egret-project/egret/connlimit"
)

// transport carries the gossip over UDP and TCP at one address. The library's own makes a buffer of 64 KB for each
// packet that comes, which was most of what an agent at rest allocated, and looks addresses up by their text.
type transport struct {
	packets *net.UDPConn
	streams net.Listener
	log     *slog.Logger

	receive chan *memberlist.Packet
	accept  chan net.Conn
	closed  chan struct{}
	running sync.WaitGroup
	longest func() int // how many bytes a connection may bring at most
}

// receiveBuffer is the socket's, for packets that come while the process does not run: as large as the kernel allows,
// up to this.
const receiveBuffer = 2 << 20

// acceptPause is how long accepting waits after an error, as when there are no file descriptors left.
const acceptPause = 100 * time.Millisecond

// maxStreams is how many connections of others are open at a time. A member's has done its work in milliseconds; the
// library keeps one that says nothing for a second.
const maxStreams = 64

// listen takes the port at an address of this node. What a connection brings beyond longest bytes is not read: before
// the library has read all of it, it does not know who that is, and takes 20 MB of anybody who can reach the port, pods
// among them. The caller shuts the transport down.
func listen(at netip.AddrPort, longest func() int, log *slog.Logger) (*transport, error) {
	streams, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	packets, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, errors.Join(err, streams.Close())
	}
	_ = packets.SetReadBuffer(receiveBuffer) // with a smaller one it works, too
	t := &transport{packets: packets, streams: connlimit.New(streams, maxStreams, nil), log: log, longest: longest,
		receive: make(chan *memberlist.Packet), accept: make(chan net.Conn), closed: make(chan struct{})}
	t.running.Go(t.read)
	t.running.Go(t.take)
	return t, nil
}

// read passes packets on until the transport is shut down. What is passed on may be kept, so each has bytes of its own.
func (t *transport) read() {
	buffer := make([]byte, 1<<16) // the longest datagram fits
	for {
		n, from, err := t.packets.ReadFromUDPAddrPort(buffer)
		now := time.Now()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n == 0 { // a socket that takes any sender's packets has no error of its own that lasts
			continue
		}
		p := &memberlist.Packet{Buf: append(make([]byte, 0, n), buffer[:n]...), From: net.UDPAddrFromAddrPort(unmapped(from)), Timestamp: now}
		select {
		case t.receive <- p:
		case <-t.closed:
			return
		}
	}
}

// take passes connections on until the transport is shut down.
func (t *transport) take() {
	for {
		c, err := t.streams.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			t.log.Debug("accepting a connection of the gossip", "err", err)
			select {
			case <-time.After(acceptPause):
				continue
			case <-t.closed:
				return
			}
		}
		select {
		case t.accept <- &stream{Conn: c, left: t.longest()}:
		case <-t.closed:
			_ = c.Close() // nobody has used it
			return
		}
	}
}

// stream is a connection that another has made.
type stream struct {
	net.Conn
	left int // bytes that it may still bring
}

// errTooLong ends a connection that brings more than a member has to say.
var errTooLong = errors.New("more than a member of the gossip has to say")

func (s *stream) Read(b []byte) (int, error) {
	if s.left <= 0 {
		return 0, errTooLong
	}
	n, err := s.Conn.Read(b[:min(len(b), s.left)])
	s.left -= n
	return n, err
}

// FinalAdvertiseAddr returns the address that the others are told. See memberlist.Transport for this and what follows.
func (t *transport) FinalAdvertiseAddr(ip string, port int) (net.IP, int, error) {
	addr, err := netip.ParseAddr(ip)
	return addr.AsSlice(), port, err
}

// WriteTo sends a packet.
func (t *transport) WriteTo(b []byte, to string) (time.Time, error) {
	addr, err := netip.ParseAddrPort(to)
	if err != nil {
		return time.Time{}, fmt.Errorf("sending a packet of the gossip: %w", err)
	}
	_, err = t.packets.WriteToUDPAddrPort(b, unmapped(addr))
	return time.Now(), err
}

// WriteToAddress sends a packet.
func (t *transport) WriteToAddress(b []byte, to memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, to.Addr)
}

// DialTimeout connects to a member.
func (t *transport) DialTimeout(to string, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", to, timeout)
}

// DialAddressTimeout connects to a member.
func (t *transport) DialAddressTimeout(to memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(to.Addr, timeout)
}

// PacketCh delivers the packets that come.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.receive }

// StreamCh delivers the connections that others make.
func (t *transport) StreamCh() <-chan net.Conn { return t.accept }

// Shutdown gives the port back, and returns when nothing runs any more. It may be called again.
func (t *transport) Shutdown() error {
	select {
	case <-t.closed:
		return nil
	default:
	}
	close(t.closed)
	err := errors.Join(t.packets.Close(), t.streams.Close())
	t.running.Wait()
	return err
}

func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
