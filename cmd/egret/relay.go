package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"sync"
	"time"

	"github.com/egret-project/egret/monitor"
)

const (
	// maxRelayed is how many connections the relay has at a time; a further one is closed at once. A command of an
	// operator has one for each member of etcd that it is told of, and one for its watches.
	maxRelayed = 32
	// relayDials is how long the relay tries to reach one endpoint of etcd before it tries the next.
	relayDials = 2 * time.Second
	// relayWaits is how long a client that says nothing is waited for: it begins, by TLS. And one that etcd has left,
	// until it leaves, too: it may have to read what etcd said last.
	relayWaits = 5 * time.Second
)

// relay passes TCP connections from a loopback address of crdsync on to etcd, so that `egret --kubeconfig` reaches etcd
// by a port-forward. It sees no more than what the two ends encrypt, and shows etcd no certificate: the operator does.
type relay struct {
	address   string   // host:port, loopback; empty: there is none
	endpoints []string // of etcd, host:port or URLs; tried in their order
	log       *slog.Logger
}

func (r *relay) validate() error {
	if r.address != "" && !monitor.IsLocal(r.address) {
		return fmt.Errorf("--etcd-relay-address %q: want a loopback address and a port, like 127.0.0.1:8488, or nothing", r.address)
	}
	return nil
}

// serve returns when ctx has ended and all connections are closed. What it cannot do it logs: nothing else of crdsync
// needs it.
func (r *relay) serve(ctx context.Context) {
	if r.address == "" {
		return
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", r.address)
	if err != nil {
		r.log.Error("egret --kubeconfig will not reach etcd by this crdsync", "err", fmt.Errorf("--etcd-relay-address: %w", err))
		return
	}
	defer context.AfterFunc(ctx, func() { _ = listener.Close() })() // Accept returns, whatever Close says
	var wg sync.WaitGroup
	defer wg.Wait()
	places := make(chan struct{}, maxRelayed)
	for {
		client, err := listener.Accept()
		if ctx.Err() != nil {
			return
		}
		if err != nil { // as where the process has no file descriptor left
			r.log.Warn("a connection to etcd's relay was not accepted; will retry", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		select {
		case places <- struct{}{}:
		default:
			_ = client.Close() // that is the answer
			continue
		}
		wg.Go(func() {
			defer func() { <-places }()
			r.pass(ctx, client)
		})
	}
}

// pass connects a client with the first endpoint that can be reached, until one of them has said all, and the other one
// too, or ctx has ended. A client keeps no place that has nothing to say, or nobody to hear it.
func (r *relay) pass(ctx context.Context, client net.Conn) {
	defer client.Close()
	etcd, err := r.dial(ctx)
	if err != nil {
		r.log.Warn("etcd could not be reached for an operator's command", "err", err)
		return
	}
	defer etcd.Close()
	leave := func() { _ = errors.Join(client.Close(), etcd.Close()) } // ends the copying
	defer context.AfterFunc(ctx, leave)()
	silent := time.AfterFunc(relayWaits, leave)
	defer silent.Stop()
	var left *time.Timer
	var wg sync.WaitGroup
	wg.Go(func() {
		defer closeWrite(etcd)
		if _, err := io.CopyN(etcd, client, 1); err == nil && silent.Stop() {
			_, _ = io.Copy(etcd, client) // the ends see what is missing
		}
	})
	wg.Go(func() {
		_, _ = io.Copy(client, etcd) // likewise
		closeWrite(client)
		left = time.AfterFunc(relayWaits, leave)
	})
	wg.Wait()
	left.Stop()
}

func closeWrite(c net.Conn) {
	if c, ok := c.(*net.TCPConn); ok {
		_ = c.CloseWrite() // it may have gone
	}
}

func (r *relay) dial(ctx context.Context) (net.Conn, error) {
	var errs []error
	for _, e := range r.endpoints {
		c, err := (&net.Dialer{Timeout: relayDials}).DialContext(ctx, "tcp", hostPort(e))
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// hostPort returns the host and port of an endpoint, which may be a URL.
func hostPort(endpoint string) string {
	if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
		return u.Host
	}
	return endpoint
}
