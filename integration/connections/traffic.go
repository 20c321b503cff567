package connections

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/integration/lab"
)

// firstPort is the source port of every pod's first connection.
const firstPort = 20000

// tick is how often a sender looks whose turn it is: short against any interval, and long against what looking costs.
const tick = 10 * time.Millisecond

// errMixedUp is an error of the end that got what was not for it. Of ICMP it is the error of the connection that it was
// for.
var errMixedUp = errors.New("got a message of another connection")

// traffic is both ends of all connections.
type traffic struct {
	family
	lab         *lab.Lab
	interval    time.Duration
	pods        []string
	connections []*connection // by id
	begin       time.Time
	fault       atomic.Int64 // when it began, on the clock of the measurement; 0 before
	quit        chan struct{}
	senders     sync.WaitGroup

	mu      sync.Mutex // guards what follows
	closers []io.Closer
	pushed  map[*connection]net.Conn
	strange map[netip.Addr]int // packets by source address that is not the egress IP
}

// plan returns the connections, of all kinds in turns. The pods share each kind and source port, so that all of them
// collide outside, unless they have ports of their own.
func plan(cfg Config) []*connection {
	all := make([]*connection, cfg.Connections)
	for i := range all {
		nth := i / cfg.Pods
		all[i] = &connection{kind: Kinds[nth%len(Kinds)], id: uint64(i), pod: i % cfg.Pods, port: firstPort + uint16(nth)}
		if cfg.OwnPorts {
			all[i].port = firstPort + uint16(i)
		}
	}
	return all
}

// newTraffic opens the servers. stop must be called, also after an error.
func newTraffic(cfg Config, l *lab.Lab, pods []string) (*traffic, error) {
	t := &traffic{
		family: families[cfg.Family], lab: l, interval: cfg.Interval, pods: pods, connections: plan(cfg), begin: time.Now(),
		quit: make(chan struct{}), pushed: map[*connection]net.Conn{}, strange: map[netip.Addr]int{},
	}
	if err := t.serve(); err != nil {
		return t, fmt.Errorf("starting the servers: %w", err)
	}
	return t, nil
}

// stop closes all sockets, and returns when nothing is sent any more. What connections suffer from it is not counted:
// take the results before.
func (t *traffic) stop() {
	close(t.quit)
	t.senders.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.closers {
		c.Close() // what fails ends with the process
	}
}

func (t *traffic) closeLater(c io.Closer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closers = append(t.closers, c)
}

// note tells that the outside host got something of a connection, and reports whether that came from where the
// connection began.
func (t *traffic) note(c *connection, from netip.AddrPort) bool {
	if from.Addr() != t.egress {
		t.mu.Lock()
		t.strange[from.Addr()]++
		t.mu.Unlock()
	}
	return c.seen(from)
}

func (t *traffic) failed(c *connection, err error) {
	if errors.Is(err, net.ErrClosed) {
		return // by stop
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		err = errno // without addresses: the same error has the same text
	}
	c.failed(err)
}

func (t *traffic) arrived(c *connection, m message) {
	c.arrived(t.now(), m.sent, time.Duration(t.fault.Load()))
}

// open opens the pods' ends, and begins to send. A connection that cannot be opened has an error, and is not
// established.
func (t *traffic) open() error {
	var g errgroup.Group
	for pod := range t.pods {
		g.Go(func() error {
			return t.lab.In("pod", t.pods[pod], func() error { return t.openPod(pod) })
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	speaking := make([][]*connection, len(t.pods))
	var pushed []*connection
	for _, c := range t.connections {
		if c.kind == Push {
			pushed = append(pushed, c)
		} else {
			speaking[c.pod] = append(speaking[c.pod], c)
		}
	}
	t.senders.Go(func() { t.push(pushed) })
	for _, all := range speaking {
		t.senders.Go(func() {
			t.pace(all, func(c *connection) error {
				if c.send == nil {
					return nil // not opened
				}
				return c.send(message{c.id, t.now()})
			})
		})
	}
	return nil
}

// openPod opens all of a pod's connections, in the namespace of the calling thread.
func (t *traffic) openPod(pod int) error {
	conn, err := t.listenICMP()
	if err != nil {
		return err
	}
	go t.readReplies(conn)
	for _, c := range t.connections {
		if c.pod != pod {
			continue
		}
		if c.kind == ICMP {
			c.send = func(m message) error { return t.sendEcho(conn, c.port, m) }
		} else if err := t.dial(c); err != nil {
			t.failed(c, err)
		}
	}
	return nil
}

// dial opens the pod's end of a connection, in the namespace of the calling thread.
func (t *traffic) dial(c *connection) error {
	to := netip.AddrPortFrom(t.outside, serverPorts[c.kind])
	d := net.Dialer{Timeout: 5 * time.Second, KeepAlive: -1}
	network, stream := t.udp, c.kind == TCP || c.kind == Push
	if stream {
		network, d.LocalAddr = t.tcp, &net.TCPAddr{Port: int(c.port)}
	} else {
		d.LocalAddr = &net.UDPAddr{Port: int(c.port)}
	}
	conn, err := d.Dial(network, to.String())
	if err != nil {
		return err
	}
	t.closeLater(conn)
	switch c.kind {
	case Push:
		if _, err := conn.Write(message{c.id, t.now()}.bytes()); err != nil {
			return err
		}
	default:
		c.send = func(m message) error {
			_, err := conn.Write(m.bytes())
			return err
		}
	}
	if stream {
		go t.readStream(c, conn)
	} else {
		go t.readDatagrams(c, conn)
	}
	return nil
}

// readStream takes what comes to the pod's end of TCP.
func (t *traffic) readStream(c *connection, conn net.Conn) {
	for b := make([]byte, messageSize); ; {
		m, of, err := t.read(conn, b)
		if err == nil && of != c {
			err = errMixedUp
		}
		if err != nil {
			t.failed(c, err)
			return
		}
		t.arrived(c, m)
	}
}

// readDatagrams takes what comes to the pod's end of UDP. An ICMP error is no end of it.
func (t *traffic) readDatagrams(c *connection, conn net.Conn) {
	for b := make([]byte, 2*messageSize); ; {
		n, err := conn.Read(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			t.failed(c, err)
		} else if m, ok := parse(b[:n]); ok && m.id == c.id {
			t.arrived(c, m)
		} else {
			t.failed(c, errMixedUp)
		}
	}
}

// readReplies takes a pod's echo replies.
func (t *traffic) readReplies(conn *net.IPConn) {
	for {
		e, _, err := t.readEcho(conn, t.reply)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		if m, ok := parse(e.Data); ok && m.id < uint64(len(t.connections)) {
			if c := t.connections[m.id]; c.kind == ICMP && c.port == uint16(e.ID) {
				t.arrived(c, m)
			} else {
				t.failed(c, errMixedUp)
			}
		}
	}
}

// sendEcho leaves the checksum of ICMPv6 to the kernel (RFC 3542, section 3.1).
func (t *traffic) sendEcho(conn *net.IPConn, id uint16, m message) error {
	b, err := (&icmp.Message{Type: t.request, Body: &icmp.Echo{ID: int(id), Seq: 1, Data: m.bytes()}}).Marshal(nil)
	if err != nil {
		return err
	}
	_, err = conn.WriteToIP(b, &net.IPAddr{IP: t.outside.AsSlice()})
	return err
}

// pace sends for each connection once an interval, spread evenly over it, until the traffic ends. What the machine does
// not let it send in an interval is left out.
func (t *traffic) pace(all []*connection, send func(*connection) error) {
	if len(all) == 0 {
		return
	}
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	begin := time.Now()
	for sent := 0; ; {
		select {
		case <-t.quit:
			return
		case <-ticker.C:
		}
		due := int(float64(time.Since(begin)) / float64(t.interval) * float64(len(all)))
		for sent = max(sent, due-len(all)); sent < due; sent++ {
			c := all[sent%len(all)]
			if err := send(c); err != nil {
				t.failed(c, err)
			}
		}
	}
}
