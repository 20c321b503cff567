package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sort"
	"time"
)

const (
	// sourceTimeout bounds Source, connection and answer.
	sourceTimeout = 5 * time.Second
	// stragglers is how long Probe waits for answers after its last datagram: far above the lab's round trip, which is
	// below 1 ms.
	stragglers = 500 * time.Millisecond
)

// Source is SourceTo OutsideIP.
func (l *Lab) Source(ctx context.Context, pod string) (netip.Addr, error) {
	return l.SourceTo(ctx, pod, OutsideIP)
}

// SourceTo opens a TCP connection from a pod (namespace/name) to an address of the outside host, OutsideIP or
// OutsideIP6, and returns the source address that was seen there. It fails after 5 s without an answer.
func (l *Lab) SourceTo(ctx context.Context, pod string, to netip.Addr) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, sourceTimeout)
	defer cancel()
	ns, err := l.target("pod", pod)
	if err != nil {
		return netip.Addr{}, err
	}
	var conn net.Conn
	err = inNetns(ns, func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(to, EchoPort).String())
		return err
	})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("connecting from pod %s: %w", pod, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	line, err := io.ReadAll(conn)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return netip.Addr{}, fmt.Errorf("reading the answer to pod %s: %w", pod, err)
	}
	seen, err := netip.ParseAddrPort(string(bytes.TrimSpace(line)))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("reading the answer to pod %s: %w", pod, err)
	}
	return seen.Addr(), nil
}

// ProbeResult is what Probe measured.
type ProbeResult struct {
	Sent, Lost int
	// LongestGap is the longest time in which no datagram was sent that was answered: between one that was and the
	// next, or the ends of the probe. Without loss it is the interval.
	LongestGap time.Duration
	// Tail is how long before the end of the probe the last datagram was sent that was answered: the whole probe when
	// none was.
	Tail time.Duration
	// Sources counts the answered datagrams by the source address seen outside.
	Sources map[netip.Addr]int
	// Ports counts them by the source port seen outside. They are all of one flow: more than one means that it was
	// translated anew.
	Ports map[uint16]int
	// Stalled is the time in which the machine did not let the probe send: what each pause between two datagrams has
	// over 20 ms.
	Stalled time.Duration
	// LostAwake is how many of those that were lost the machine does not account for: they were sent neither right
	// before it stood still, as Stalled has it, nor afterwards, for as long as it had stood still.
	LostAwake int
}

// MarshalJSON writes the gap in milliseconds.
func (r ProbeResult) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]any{
		"sent": r.Sent, "lost": r.Lost, "longestGapMs": float64(r.LongestGap.Microseconds()) / 1000, "sources": r.Sources,
	})
}

// String prints a line per number, as the command does.
func (r ProbeResult) String() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "sent         %d\nlost         %d\nlongest gap  %v\n", r.Sent, r.Lost, r.LongestGap.Round(100*time.Microsecond))
	var ips []netip.Addr
	for ip := range r.Sources {
		ips = append(ips, ip)
	}
	sort.Slice(ips, func(i, j int) bool { return ips[i].Less(ips[j]) })
	for _, ip := range ips {
		fmt.Fprintf(&b, "source       %v: %d\n", ip, r.Sources[ip])
	}
	return b.String()
}

// Probe is ProbeTo OutsideIP.
func (l *Lab) Probe(ctx context.Context, pod string, interval, duration time.Duration) (ProbeResult, error) {
	return l.ProbeTo(ctx, pod, OutsideIP, interval, duration)
}

// ProbeTo sends a datagram every interval from a pod (namespace/name) to an address of the outside host, OutsideIP or
// OutsideIP6, all of one flow, and takes the answers. It returns after duration, or with what it has measured until
// then when ctx ends.
func (l *Lab) ProbeTo(ctx context.Context, pod string, to netip.Addr, interval, duration time.Duration) (ProbeResult, error) {
	if interval <= 0 || duration < interval {
		return ProbeResult{}, fmt.Errorf("probe of %v every %v: want an interval above 0, and a duration no shorter", duration, interval)
	}
	ns, err := l.target("pod", pod)
	if err != nil {
		return ProbeResult{}, err
	}
	var conn *net.UDPConn
	err = inNetns(ns, func() (err error) {
		conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, EchoPort)))
		return err
	})
	if err != nil {
		return ProbeResult{}, fmt.Errorf("opening a socket in pod %s: %w", pod, err)
	}
	defer conn.Close()
	if err := Enlarge(conn, echoBuffer); err != nil {
		return ProbeResult{}, fmt.Errorf("probing from pod %s: %w", pod, err)
	}
	answers := make(chan map[uint64]netip.AddrPort)
	go func() { answers <- receive(conn) }()

	begin := time.Now()
	sentAt := make([]time.Duration, 0, duration/interval)
	for i := range uint64(duration / interval) {
		// by the clock, not by the last one: what the scheduler delays is caught up with
		if sleep(ctx, time.Until(begin.Add(time.Duration(i)*interval))) != nil {
			break
		}
		sentAt = append(sentAt, time.Since(begin))
		// an error is a datagram that is lost, as a refused one before it is
		conn.Write(binary.BigEndian.AppendUint64(nil, i))
	}
	end := time.Since(begin)
	if err := conn.SetReadDeadline(time.Now().Add(stragglers)); err != nil {
		return ProbeResult{}, err
	}
	return evaluate(sentAt, end, <-answers), nil
}

// Conversation is an open TCP connection from a pod to the outside host.
type Conversation struct {
	pod     string
	in, out net.Conn
}

// Converse opens a TCP connection from a pod (namespace/name) to an address of the outside host, OutsideIP or
// OutsideIP6. Who calls it calls Close.
func (l *Lab) Converse(ctx context.Context, pod string, to netip.Addr) (*Conversation, error) {
	ctx, cancel := context.WithTimeout(ctx, sourceTimeout)
	defer cancel()
	ns, err := l.target("pod", pod)
	if err != nil {
		return nil, err
	}
	var ln net.Listener
	err = inNetns(l.netns("outside"), func() (err error) {
		ln, err = net.Listen("tcp", netip.AddrPortFrom(to, 0).String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listening at the outside host: %w", err)
	}
	defer ln.Close()
	c := &Conversation{pod: pod}
	err = inNetns(ns, func() (err error) {
		c.out, err = (&net.Dialer{}).DialContext(ctx, "tcp", ln.Addr().String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connecting from pod %s: %w", pod, err)
	}
	if c.in, err = ln.Accept(); err != nil {
		c.out.Close()
		return nil, fmt.Errorf("accepting pod %s: %w", pod, err)
	}
	return c, nil
}

// Close ends the connection.
func (c *Conversation) Close() error { return errors.Join(c.out.Close(), c.in.Close()) }

// Exchange sends something each way, and fails when it has not arrived at the timeout.
func (c *Conversation) Exchange(timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for _, way := range []struct {
		name     string
		from, to net.Conn
	}{{"to the outside host", c.out, c.in}, {"from the outside host", c.in, c.out}} {
		b := []byte("hello")
		_, err := way.from.Write(b)
		if err == nil {
			err = way.to.SetReadDeadline(deadline)
		}
		if err == nil {
			_, err = io.ReadFull(way.to, b)
		}
		if err != nil {
			return fmt.Errorf("the open connection of pod %s, %s: %w", c.pod, way.name, err)
		}
	}
	return nil
}

// Push has the outside host speak on the connection, every interval, until the function is called that it returns: that
// one says what has not arrived at the pod by the timeout, while the pod said nothing.
func (c *Conversation) Push(interval time.Duration) (end func(timeout time.Duration) error) {
	stop, stopped := make(chan struct{}), make(chan error, 1)
	sent := 0
	go func() {
		every := time.NewTicker(interval)
		defer every.Stop()
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			case <-every.C:
			}
			if _, err := c.in.Write([]byte("push")); err != nil {
				stopped <- err
				return
			}
			sent++
		}
	}()
	arrived, read := 0, make(chan error, 1)
	go func() {
		b := make([]byte, len("push"))
		for {
			if _, err := io.ReadFull(c.out, b); err != nil {
				read <- err
				return
			}
			arrived++
		}
	}()
	return func(timeout time.Duration) error {
		close(stop)
		err := <-stopped
		if err == nil {
			_, err = c.in.Write([]byte("push"))
			sent++
		}
		// What was lost is sent again, later and later: the end of the stream tells that all has come.
		if closer, ok := c.in.(interface{ CloseWrite() error }); ok && err == nil {
			err = closer.CloseWrite()
		}
		if deadline := c.out.SetReadDeadline(time.Now().Add(timeout)); err == nil {
			err = deadline
		}
		if ended := <-read; err == nil && !errors.Is(ended, io.EOF) {
			err = ended
		}
		if err == nil && arrived != sent {
			err = fmt.Errorf("%d of %d messages arrived", arrived, sent)
		}
		if err != nil {
			return fmt.Errorf("the open connection of pod %s, on which the outside host speaks: %w", c.pod, err)
		}
		return nil
	}
}

// Throughput sends as much as it can over one TCP connection from a pod (namespace/name) to an address of the outside
// host, OutsideIP or OutsideIP6, for the duration, and returns how many bits per second arrived there.
func (l *Lab) Throughput(ctx context.Context, pod string, to netip.Addr, duration time.Duration) (float64, error) {
	c, err := l.Converse(ctx, pod, to)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.in.Close() })()
	go func() {
		b := make([]byte, 1<<20)
		for {
			if _, err := c.out.Write(b); err != nil {
				return // closed at the end
			}
		}
	}()
	begin := time.Now()
	if err := c.in.SetReadDeadline(begin.Add(duration)); err != nil {
		return 0, err
	}
	n, err := io.Copy(struct{ io.Writer }{io.Discard}, c.in)
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, fmt.Errorf("receiving from pod %s: the connection ended after %v: %w", pod, time.Since(begin), err)
	}
	return float64(n) * 8 / duration.Seconds(), nil
}

// receive collects the answers, number to address, until the read deadline or the end of the socket.
func receive(conn *net.UDPConn) map[uint64]netip.AddrPort {
	got := map[uint64]netip.AddrPort{}
	buf := make([]byte, 2048)
	for {
		n, err := conn.Read(buf)
		var timeout net.Error
		if errors.Is(err, net.ErrClosed) || errors.As(err, &timeout) && timeout.Timeout() {
			return got
		}
		if err != nil || n < 8 {
			continue // an ICMP error about an earlier datagram: that one is lost, no more
		}
		if from, err := netip.ParseAddrPort(string(buf[8:n])); err == nil {
			got[binary.BigEndian.Uint64(buf)] = from
		}
	}
}

// stalls is a pause of a sender that sends every few milliseconds: the machine stands still.
const stalls = 20 * time.Millisecond

// stallsWithin reports whether the machine stood still within a time after the first of these datagrams was sent.
func stallsWithin(sentAt []time.Duration, time time.Duration) bool {
	for i := 1; i < len(sentAt) && sentAt[i-1]-sentAt[0] <= time; i++ {
		if sentAt[i]-sentAt[i-1] > stalls {
			return true
		}
	}
	return false
}

// evaluate sums up a probe: when each datagram was sent, when the sending ended, and which were answered.
func evaluate(sentAt []time.Duration, end time.Duration, answers map[uint64]netip.AddrPort) ProbeResult {
	r := ProbeResult{Sent: len(sentAt), Sources: map[netip.Addr]int{}, Ports: map[uint16]int{}}
	var last time.Duration
	excused := time.Duration(-1) // until then, what is lost is the machine's
	for i, at := range sentAt {
		if i > 0 {
			r.Stalled += max(0, at-sentAt[i-1]-stalls)
		}
		if i > 0 && at-sentAt[i-1] > stalls {
			excused = max(excused, at+(at-sentAt[i-1]))
		}
		from, ok := answers[uint64(i)]
		if !ok {
			r.Lost++
			if at > excused && !stallsWithin(sentAt[i:], stalls) {
				r.LostAwake++
			}
			continue
		}
		r.Sources[from.Addr()]++
		r.Ports[from.Port()]++
		r.LongestGap = max(r.LongestGap, at-last)
		last = at
	}
	r.Tail = end - last
	r.LongestGap = max(r.LongestGap, r.Tail)
	return r
}
