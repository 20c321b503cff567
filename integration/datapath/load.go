package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// Column is one figure of a path.
type Column struct {
	Name, Unit string
	Less       bool // less is better
}

// Columns are what is measured: TCP throughput of one connection, datagrams of 64 bytes of payload that arrive, TCP
// connections opened by 4 clients, and requests and answers of one byte over one TCP connection, with their latency.
var Columns = [...]Column{
	{"tcp", "Mbit/s", false}, {"datagrams", "1/s", false}, {"connections", "1/s", false}, {"requests", "1/s", false},
	{"p50", "us", true}, {"p99", "us", true},
}

// measurements fill the columns, one after another.
var measurements = []func(ctx context.Context, l *lab.Lab, pod string, d time.Duration, v *[len(Columns)]float64) error{
	throughput, datagrams, connections, requests,
}

// The ports of the outside host: one whose datagrams are counted and not read, one that waits for the end of each
// connection, one that echoes.
const (
	sinkPort = 9001
	openPort = 9002 // and the three after it, so that source ports do not run out
	echoPort = 9010
	clients  = 4
)

// serve starts the servers of the outside host.
func serve(l *lab.Lab) (stop func(), err error) {
	var closers []io.Closer
	stop = func() {
		for _, c := range closers {
			c.Close() // what fails ends with the process
		}
	}
	listen := func(port int, handle func(net.Conn)) error {
		ln, err := net.Listen("tcp", netip.AddrPortFrom(lab.OutsideIP, uint16(port)).String())
		if err != nil {
			return err
		}
		closers = append(closers, ln)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return // closed
				}
				go func() { defer c.Close(); handle(c) }()
			}
		}()
		return nil
	}
	err = l.In("outside", "", func() error {
		sink, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(lab.OutsideIP, sinkPort)))
		if err != nil {
			return err
		}
		closers = append(closers, sink)
		for i := range clients {
			if err := listen(openPort+i, func(c net.Conn) { c.Read(make([]byte, 1)) }); err != nil {
				return err
			}
		}
		return listen(echoPort, func(c net.Conn) { io.Copy(struct{ io.Writer }{c}, c) })
	})
	if err != nil {
		stop()
		return nil, fmt.Errorf("starting the servers: %w", err)
	}
	return stop, nil
}

func throughput(ctx context.Context, l *lab.Lab, pod string, d time.Duration, v *[len(Columns)]float64) error {
	bits, err := l.Throughput(ctx, pod, lab.OutsideIP, d)
	v[0] = bits / 1e6
	return err
}

// dial opens a connection, or a socket, in a pod.
func dial(l *lab.Lab, pod, network string, port int) (conn net.Conn, err error) {
	err = l.In("pod", pod, func() (err error) {
		conn, err = net.DialTimeout(network, netip.AddrPortFrom(lab.OutsideIP, uint16(port)).String(), 5*time.Second)
		return err
	})
	return conn, err
}

// datagrams sends as many as it can. What the outside host's link received counts: nobody reads them, so that no reader
// is measured.
func datagrams(ctx context.Context, l *lab.Lab, pod string, d time.Duration, v *[len(Columns)]float64) error {
	conn, err := dial(l, pod, "udp", sinkPort)
	if err != nil {
		return err
	}
	defer conn.Close()
	before, err := received(l)
	if err != nil {
		return err
	}
	b := make([]byte, 64)
	begin := time.Now()
	for n := 0; n%64 != 0 || time.Since(begin) < d; n++ {
		conn.Write(b) // what the kernel does not take is not received
	}
	took := time.Since(begin)
	after, err := received(l)
	if err != nil {
		return err
	}
	v[1] = float64(after-before) / took.Seconds()
	return ctx.Err()
}

// received returns how many packets the outside host's link has received.
func received(l *lab.Lab) (n int, err error) {
	err = l.In("outside", "", func() error {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if fields := strings.Fields(line); len(fields) > 2 && fields[0] == "eth0:" {
				n, err = strconv.Atoi(fields[2])
				return err
			}
		}
		return errors.New("the outside host has no eth0")
	})
	return n, err
}

// connections opens connections and resets them, so that neither side keeps them.
func connections(ctx context.Context, l *lab.Lab, pod string, d time.Duration, v *[len(Columns)]float64) error {
	var opened atomic.Int64
	errs := make([]error, clients)
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			errs[i] = l.In("pod", pod, func() error {
				for ctx.Err() == nil && time.Since(begin) < d {
					conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(lab.OutsideIP, uint16(openPort+i)).String(), 5*time.Second)
					if err != nil {
						return err
					}
					conn.(*net.TCPConn).SetLinger(0) // else it waits in TIME_WAIT
					conn.Close()
					opened.Add(1)
				}
				return ctx.Err()
			})
		})
	}
	wg.Wait()
	v[2] = float64(opened.Load()) / time.Since(begin).Seconds()
	return errors.Join(errs...)
}

// requests asks, and asks again once it has the answer.
func requests(ctx context.Context, l *lab.Lab, pod string, d time.Duration, v *[len(Columns)]float64) error {
	conn, err := dial(l, pod, "tcp", echoPort)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(d + 5*time.Second)); err != nil {
		return err
	}
	b := make([]byte, 1)
	var took []time.Duration
	for begin := time.Now(); ctx.Err() == nil && time.Since(begin) < d; {
		sent := time.Now()
		if _, err := conn.Write(b); err != nil {
			return err
		}
		if _, err := conn.Read(b); err != nil {
			return err
		}
		took = append(took, time.Since(sent))
	}
	if len(took) == 0 {
		return errors.Join(ctx.Err(), errors.New("no request was answered"))
	}
	slices.Sort(took)
	for i, q := range []float64{0.5, 0.99} {
		v[4+i] = float64(took[int(q*float64(len(took)))].Nanoseconds()) / 1000
	}
	v[3] = float64(len(took)) / d.Seconds()
	return ctx.Err()
}
