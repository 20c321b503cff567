package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/internal/syncbuf"
)

// relayed starts a relay to endpoints, and returns what it logs and where it listens.
func relayed(t *testing.T, endpoints ...string) (*syncbuf.Buffer, string) {
	t.Helper()
	log := &syncbuf.Buffer{}
	r := relay{address: fmt.Sprintf("127.0.0.1:%d", port.Hold(t)), endpoints: endpoints, log: slog.New(slog.NewTextHandler(log, nil))}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.serve(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	return log, r.address
}

// backend is a server that answers what a client has said in capitals, once the client has said all.
func backend(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				_, _ = c.Write(bytes.ToUpper(b))
			}()
		}
	}()
	return l.Addr().String()
}

func connect(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", address)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			return c.(*net.TCPConn)
		}
		if time.Now().After(until) {
			t.Fatal(err)
		}
	}
}

func TestTheRelayPassesOnToAnEndpointThatIsThere(t *testing.T) {
	_, address := relayed(t, "https://127.0.0.1:1", "https://"+backend(t))
	said := strings.Repeat("etcd", 1<<16)
	c := connect(t, address)
	if _, err := c.Write([]byte(said)); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil || string(b) != strings.ToUpper(said) {
		t.Errorf("%d bytes, %v: want an answer of %d", len(b), err, len(said))
	}
}

func TestWithoutAnEndpointTheRelayClosesAndSaysWhy(t *testing.T) {
	log, address := relayed(t, "127.0.0.1:1", "127.0.0.1:2")
	if b, err := io.ReadAll(connect(t, address)); err != nil || len(b) > 0 {
		t.Errorf("%q, %v: want a closed connection", b, err)
	}
	if s := log.String(); !strings.Contains(s, "127.0.0.1:1:") || !strings.Contains(s, "127.0.0.1:2:") {
		t.Errorf("log %q: want both endpoints, and why", s)
	}
}

// A process of the node may open as many connections as it likes.
func TestTheRelayHasABoundedNumberOfConnections(t *testing.T) {
	_, address := relayed(t, backend(t))
	open := make([]*net.TCPConn, maxRelayed)
	for i := range open {
		open[i] = connect(t, address)
		if _, err := open[i].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := io.ReadAll(connect(t, address)); len(b) > 0 {
		t.Errorf("one more got %q, %v: want it closed", b, err)
	}
	if err := open[0].CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(open[0]); err != nil || string(b) != "X" {
		t.Errorf("one of those before got %q, %v", b, err)
	}
}

// Nor does he keep operators out by connections that say nothing, or that etcd has closed, as where its limit or the
// client's certificate was refused.
func TestTheRelayKeepsNoPlaceForThoseThatNobodyTalksWith(t *testing.T) {
	for name, said := range map[string]string{"who says nothing": "", "whom etcd has left": "x"} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			go func() {
				for n := 0; ; n++ {
					c, err := l.Accept()
					if err != nil {
						return
					}
					if n < maxRelayed && said != "" {
						go func() { _, _ = c.Read(make([]byte, 1)); c.Close() }()
						continue
					}
					t.Cleanup(func() { c.Close() })
					go func() {
						b, _ := io.ReadAll(c)
						_, _ = c.Write(bytes.ToUpper(b))
						_ = c.Close()
					}()
				}
			}()
			_, address := relayed(t, l.Addr().String())
			for range maxRelayed {
				if _, err := connect(t, address).Write([]byte(said)); err != nil {
					t.Fatal(err)
				}
			}
			for until := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
				c := connect(t, address)
				_, _ = c.Write([]byte("operator")) // it may be closed already
				_ = c.CloseWrite()
				b, _ := io.ReadAll(c)
				c.Close()
				if string(b) == "OPERATOR" {
					break
				} else if time.Now().After(until) {
					t.Fatalf("an operator got %q, and no place", b)
				}
			}
		})
	}
}

func TestTheRelayIsOnLoopbackAlone(t *testing.T) {
	for address, ok := range map[string]bool{"": true, "127.0.0.1:8488": true, "[::1]:8488": true, "0.0.0.0:8488": false, ":8488": false, "10.0.0.1:8488": false} {
		if err := (&relay{address: address}).validate(); (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "--etcd-relay-address") {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestAPortThatIsTakenLeavesCrdsyncAlone(t *testing.T) {
	taken := backend(t)
	log := &syncbuf.Buffer{}
	(&relay{address: taken, log: slog.New(slog.NewTextHandler(log, nil))}).serve(t.Context())
	if s := log.String(); !strings.Contains(s, taken) || !strings.Contains(s, "level=ERROR") {
		t.Errorf("log %q: want an error that names the address", s)
	}
}
