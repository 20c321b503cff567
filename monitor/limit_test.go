package monitor

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/egret-project/egret/connlimit"
	"github.com/egret-project/egret/internal/port"
)

// serveTLS serves h to clients without a certificate until the test ends, and returns where, and what clients trust.
func serveTLS(t *testing.T, most int, h http.Handler) (address string, trusted *tls.Config) {
	t.Helper()
	ca := newAuthority(t)
	files := ca.files(t, "egret")
	files.Anonymous, files.ClientCA = true, ""
	address = fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); ServeTLS(ctx, address, files, most, h, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() { stop(); <-done })
	client := ca.client(t, nil, time.Time{})
	await(t, func() bool { _, _, err := ask(client, "https://"+address+"/"); return err == nil })
	return address, client.Transport.(*http.Transport).TLSClientConfig
}

// dialFrom connects with a source address.
func dialFrom(t *testing.T, source, address string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	c, err := d.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // the server may have
	return c
}

// An attempt: somebody who has shown nothing takes all connections that there are, so that viewers lose theirs.
func TestWhoHoldsManyConnectionsTakesThemFromHimself(t *testing.T) {
	t.Parallel()
	const most = 8
	release := make(chan struct{})
	once := sync.OnceFunc(func() { close(release) })
	address, trusted := serveTLS(t, most, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/events" {
			<-release
		}
		_, _ = io.WriteString(w, "ok") // who asked has gone
	}))
	t.Cleanup(once)
	viewer := tls.Client(dialFrom(t, "127.0.0.1", address), trusted)
	if _, err := io.WriteString(viewer, "GET /events HTTP/1.1\r\nHost: egret\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	other := &http.Client{Transport: &http.Transport{TLSClientConfig: trusted, DisableKeepAlives: true}}
	for range 5 * most {
		dialFrom(t, "127.0.0.2", address)
		if code, _, err := ask(other, "https://"+address+"/"); err != nil || code != 200 {
			t.Fatalf("beside connections of another client: %d, %v", code, err)
		}
	}
	once()
	_ = viewer.SetReadDeadline(time.Now().Add(20 * time.Second))
	if b, err := io.ReadAll(viewer); err != nil || len(b) == 0 {
		t.Errorf("the viewer, who was there first, was answered with %q, %v", b, err)
	}
}

// An attempt: where the CNI masquerades what pods send, those of the viewer's node have his address, and connect until
// his connection is the oldest of the client that has most.
func TestAFloodFromHisAddressTakesNothingFromWhoIsKnown(t *testing.T) {
	t.Parallel()
	const most = 8
	release := make(chan struct{})
	once := sync.OnceFunc(func() { close(release) })
	known := make(chan bool, 1)
	address, trusted := serveTLS(t, most, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/events" {
			connlimit.Keep(r.Context())
			known <- true
			<-release
		}
		_, _ = io.WriteString(w, "ok") // who asked has gone
	}))
	t.Cleanup(once)
	viewer := tls.Client(dialFrom(t, "127.0.0.1", address), trusted)
	if _, err := io.WriteString(viewer, "GET /events HTTP/1.1\r\nHost: egret\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-known
	another := &http.Client{Transport: &http.Transport{TLSClientConfig: trusted, DisableKeepAlives: true}}
	for range 5 * most {
		dialFrom(t, "127.0.0.1", address)
		if code, _, err := ask(another, "https://"+address+"/"); err != nil || code != 200 {
			t.Fatalf("beside connections from the same address: %d, %v", code, err)
		}
	}
	once()
	_ = viewer.SetReadDeadline(time.Now().Add(20 * time.Second))
	if b, err := io.ReadAll(viewer); err != nil || len(b) == 0 {
		t.Errorf("the viewer, who was there first, was answered with %q, %v", b, err)
	}
}

// An attempt: clients that take their time, each of which holds a connection.
func TestClientsThatAreSlowAreCut(t *testing.T) {
	t.Parallel()
	address, trusted := serveTLS(t, 8, http.NotFoundHandler())
	plain := func() net.Conn { return dialFrom(t, "127.0.0.1", address) }
	for name, slow := range map[string]func() net.Conn{
		"says nothing":       plain,
		"begins a handshake": func() net.Conn { return drip(t, plain(), "\x16\x03\x01\x02\x00\x01") },
		"sends a header slowly": func() net.Conn {
			return drip(t, tls.Client(plain(), trusted), "GET / HTTP/1.1\r\nX: ")
		},
		"says nothing over TLS": func() net.Conn {
			c := tls.Client(plain(), trusted)
			if err := c.HandshakeContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			c := slow()
			_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
				t.Fatalf("it is served after %v", time.Since(began))
			}
		})
	}
}

// drip writes a text, and then a byte now and then.
func drip(t *testing.T, c net.Conn, text string) net.Conn {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	var sending sync.WaitGroup
	sending.Go(func() {
		for tick := time.NewTicker(100 * time.Millisecond); ; <-tick.C {
			if _, err := io.WriteString(c, "a"); err != nil {
				return
			}
		}
	})
	t.Cleanup(func() { _ = c.Close(); sending.Wait() }) // the server may have closed it
	return c
}
