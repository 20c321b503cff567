package connections

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/egret-project/egret/integration/lab"
)

// serverPorts are where the outside host serves each kind; its kernel answers echo requests.
var serverPorts = map[Kind]uint16{TCP: 9101, Push: 9102, UDP: 9103, QUIC: 9104}

// receiveBuffer of the sockets that hold the datagrams of many connections: room for all of them, at 768 bytes each.
const receiveBuffer = 16 << 20

// family is what differs between IPv4 and IPv6.
type family struct {
	egress, outside netip.Addr
	tcp, udp, icmp  string // networks, as package net has them
	protocol        int    // of ICMP
	request, reply  icmp.Type
}

var families = map[int]family{
	4: {netip.MustParseAddr("10.10.0.11"), lab.OutsideIP, "tcp4", "udp4", "ip4:icmp", 1, ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply},
	6: {netip.MustParseAddr("fd10::11"), lab.OutsideIP6, "tcp6", "udp6", "ip6:ipv6-icmp", 58, ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply},
}

// serve opens the servers of the outside host.
func (t *traffic) serve() error {
	return t.lab.In("outside", "", func() error {
		for kind, serve := range map[Kind]func(net.Conn){TCP: t.answer, Push: t.admit} {
			ln, err := net.Listen(t.tcp, netip.AddrPortFrom(t.outside, serverPorts[kind]).String())
			if err != nil {
				return err
			}
			t.closeLater(ln)
			go t.accept(ln, serve)
		}
		for _, kind := range []Kind{UDP, QUIC} {
			conn, err := net.ListenUDP(t.udp, net.UDPAddrFromAddrPort(netip.AddrPortFrom(t.outside, serverPorts[kind])))
			if err != nil {
				return err
			}
			t.closeLater(conn)
			if err := lab.Enlarge(conn, receiveBuffer); err != nil {
				return err
			}
			go t.answerDatagrams(conn, kind)
		}
		conn, err := t.listenICMP()
		if err != nil {
			return err
		}
		go t.watchRequests(conn)
		return nil
	})
}

func (t *traffic) accept(ln net.Listener, serve func(net.Conn)) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return // closed
		}
		t.closeLater(conn)
		quiet(conn)
		go serve(conn)
	}
}

// quiet turns keep-alive off: where only the server speaks, the pod says nothing by itself.
func quiet(conn net.Conn) {
	conn.(*net.TCPConn).SetKeepAlive(false) // fails for a socket that is closed only
}

// read reads the next message of a connection of a kind.
func (t *traffic) read(conn net.Conn, b []byte) (message, *connection, error) {
	if _, err := io.ReadFull(conn, b); err != nil {
		return message{}, nil, err
	}
	m, _ := parse(b)
	if m.id >= uint64(len(t.connections)) {
		return message{}, nil, fmt.Errorf("a message of connection %d, which there is not", m.id)
	}
	return m, t.connections[m.id], nil
}

// hello reads who the peer is from its first message.
func (t *traffic) hello(conn net.Conn, b []byte) *connection {
	_, c, err := t.read(conn, b)
	if err != nil {
		return nil // it is not established, which is what shows
	}
	t.note(c, conn.RemoteAddr().(*net.TCPAddr).AddrPort())
	return c
}

// answer is the server of TCP.
func (t *traffic) answer(conn net.Conn) {
	b := make([]byte, messageSize)
	c := t.hello(conn, b)
	for err := error(nil); c != nil; {
		if _, err = conn.Write(b); err == nil {
			var of *connection
			if _, of, err = t.read(conn, b); err == nil && of != c {
				err = errMixedUp
			}
		}
		if err != nil {
			t.failed(c, err)
			return
		}
	}
}

// admit begins to push to a pod.
func (t *traffic) admit(conn net.Conn) {
	c := t.hello(conn, make([]byte, messageSize))
	if c == nil {
		return
	}
	t.mu.Lock()
	t.pushed[c] = conn
	t.mu.Unlock()
	// Until it ends: the pod says nothing more.
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.failed(c, err)
	} else {
		t.failed(c, errMixedUp)
	}
}

// answerDatagrams is the server of UDP and QUIC.
func (t *traffic) answerDatagrams(conn *net.UDPConn, kind Kind) {
	b := make([]byte, 2*messageSize)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		m, ok := parse(b[:n])
		if err != nil || !ok || m.id >= uint64(len(t.connections)) || t.connections[m.id].kind != kind {
			continue
		}
		if t.note(t.connections[m.id], from) || kind == QUIC {
			conn.WriteToUDPAddrPort(b[:n], from) // what cannot be sent is lost, as any datagram may be
		}
	}
}

// watchRequests sees the echo requests that the kernel answers.
func (t *traffic) watchRequests(conn *net.IPConn) {
	for {
		e, from, err := t.readEcho(conn, t.request)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		if m, ok := parse(e.Data); ok && m.id < uint64(len(t.connections)) && t.connections[m.id].kind == ICMP {
			t.note(t.connections[m.id], netip.AddrPortFrom(from, uint16(e.ID)))
		}
	}
}

// listenICMP opens a raw socket in the namespace of the calling thread, which gets all of its ICMP.
func (t *traffic) listenICMP() (*net.IPConn, error) {
	conn, err := net.ListenIP(t.icmp, nil)
	if err != nil {
		return nil, err
	}
	t.closeLater(conn)
	return conn, lab.Enlarge(conn, receiveBuffer)
}

// readEcho reads the next packet; it is an error when that is no echo of the type.
func (t *traffic) readEcho(conn *net.IPConn, want icmp.Type) (*icmp.Echo, netip.Addr, error) {
	b := make([]byte, 256)
	n, from, err := conn.ReadFromIP(b)
	if err != nil {
		return nil, netip.Addr{}, err
	}
	m, err := icmp.ParseMessage(t.protocol, b[:n])
	if err != nil {
		return nil, netip.Addr{}, err
	}
	e, ok := m.Body.(*icmp.Echo)
	if !ok || m.Type != want {
		return nil, netip.Addr{}, fmt.Errorf("ICMP of type %v", m.Type)
	}
	ip, _ := netip.AddrFromSlice(from.IP)
	return e, ip.Unmap(), nil
}

// push sends to all pods that only listen, one after another, each once an interval, until the traffic ends.
func (t *traffic) push(all []*connection) {
	t.pace(all, func(c *connection) error {
		t.mu.Lock()
		conn := t.pushed[c]
		t.mu.Unlock()
		if conn == nil {
			return nil // not admitted
		}
		_, err := conn.Write(message{c.id, t.now()}.bytes())
		return err
	})
}

// now is the time on the clock of the measurement.
func (t *traffic) now() time.Duration { return time.Since(t.begin) }
