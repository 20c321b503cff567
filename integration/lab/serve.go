package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// relayed returns the addresses, reached from the control namespace, that programs on this machine have ports for: the
// API server's, and those of etcd's members.
func (l *Lab) relayed() []string {
	all := []string{netip.AddrPortFrom(ControlIP, apiPort).String()}
	for _, m := range l.members() {
		all = append(all, m.clientAddr())
	}
	return all
}

// serve is the lab's own background process until ctx ends: it relays the listening sockets that it was given to the
// addresses of relayed, is the echo servers of the outside host, and where there are kubelets the cluster's DNS server.
func serve(ctx context.Context, name string) error {
	l, _, err := load(name)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for i, to := range l.relayed() {
		ln, err := net.FileListener(os.NewFile(uintptr(lockFD+1+i), "listener"))
		if err != nil {
			return fmt.Errorf("taking over a listener: %w", err)
		}
		g.Go(func() error { return accept(ctx, ln, func(c net.Conn) { l.relay(ctx, c, to) }) })
	}
	err = inNetns(l.netns("outside"), func() error { return echo(ctx, g) })
	if err != nil {
		return fmt.Errorf("starting the echo servers: %w", err)
	}
	if l.cfg.Kubelet {
		if err := l.serveDNS(ctx, g); err != nil {
			return err
		}
	}
	if err := g.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// accept serves every connection in a goroutine of its own until ctx ends.
func accept(ctx context.Context, ln net.Listener, handle func(net.Conn)) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		go handle(c)
	}
}

// relay connects c with an address in the control namespace. When that refuses, c is closed: its client sees a
// connection that ends.
func (l *Lab) relay(ctx context.Context, c net.Conn, to string) {
	defer c.Close()
	var up net.Conn
	err := inNetns(l.netns("control"), func() (err error) {
		up, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", to)
		return err
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "relaying to %s: %v\n", to, err)
		return
	}
	defer up.Close()
	defer context.AfterFunc(ctx, func() { c.Close(); up.Close() })()
	ended := make(chan struct{}, 2)
	pipe := func(dst, src net.Conn) {
		io.Copy(dst, src) // either side's end or error ends this direction
		dst.(*net.TCPConn).CloseWrite()
		ended <- struct{}{}
	}
	go pipe(up, c)
	go pipe(c, up)
	<-ended
	<-ended
}

// echo starts the echo servers in the namespace of the calling thread. TCP: one line with the client's address. UDP:
// the datagram and, after it, the client's address; from a socket per address, for an answer must come from the address
// that was asked.
func echo(ctx context.Context, g *errgroup.Group) error {
	ln, err := net.Listen("tcp", fmt.Sprintf(":%d", EchoPort))
	if err != nil {
		return err
	}
	g.Go(func() error {
		return accept(ctx, ln, func(c net.Conn) {
			defer c.Close()
			fmt.Fprintln(c, unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort()))
		})
	})
	for _, f := range families() {
		for _, ip := range []netip.Addr{f.outside, f.host(outsideHost)} {
			conn, err := listenUDP(netip.AddrPortFrom(ip, EchoPort))
			if err != nil {
				return err
			}
			context.AfterFunc(ctx, func() { conn.Close() })
			g.Go(func() error { return echoUDP(ctx, conn) })
		}
	}
	return nil
}

// echoBuffer is the receive buffer of an echo server's socket. The kernel doubles it, for what it spends beside the
// payload: 768 bytes for a short datagram, so that it holds those of 10 probes of 1 ms for two seconds in which the
// machine does not let the server run. The usual one is full after 25 ms.
const echoBuffer = 8 << 20

// listenUDP opens the socket of an echo server in the namespace of the calling thread. It needs CAP_NET_ADMIN, as all
// of the lab does: the buffer is above net.core.rmem_max.
func listenUDP(at netip.AddrPort) (*net.UDPConn, error) {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	if err := Enlarge(conn, echoBuffer); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// Enlarge gives a socket a receive buffer of size bytes, which the kernel doubles (SO_RCVBUFFORCE, socket(7)).
func Enlarge(conn syscall.Conn, size int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size) })
	if err := errors.Join(err, failed); err != nil {
		return fmt.Errorf("enlarging a receive buffer to %d bytes: %w", size, err)
	}
	return nil
}

func echoUDP(ctx context.Context, conn *net.UDPConn) error {
	buf := make([]byte, 65536)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf[:1400])
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		answer := unmap(from).AppendTo(buf[:n])
		conn.WriteToUDPAddrPort(answer, from) // what cannot be sent is lost, as any datagram may be
	}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
