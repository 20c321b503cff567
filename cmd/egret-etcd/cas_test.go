package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Etcd reads the CAs that it trusts when it starts. All members see the next one at once, and are started again by their
// pods.
func TestMembersEndOneAfterTheOtherForAnotherCA(t *testing.T) {
	t.Parallel()
	i := newMembers(t, netip.MustParseAddr("127.0.0.1"))
	first, firstSigner := newCA(t, "a CA")
	next, nextSigner := newCA(t, "the next CA")
	i.trust(first)
	i.issue(first, firstSigner)
	ctx, stop := context.WithCancel(t.Context())
	var pods sync.WaitGroup
	defer pods.Wait()
	defer stop()
	var away atomic.Int32
	var mu sync.Mutex // guards ends
	var ends string   // the members that ended, in this order
	for n := range i.peers {
		pods.Go(func() {
			for {
				err := i.run(ctx, n)
				if ctx.Err() != nil {
					return
				}
				if err == nil || !strings.Contains(err.Error(), "the CAs of --certs") {
					t.Errorf("member %d ended: %v", n, err)
				}
				if now := away.Add(1); now != 1 {
					t.Errorf("%d members are away at a time", now)
				}
				mu.Lock()
				ends += fmt.Sprint(n)
				mu.Unlock()
				pods.Go(func() {
					for ctx.Err() == nil {
						if c, err := net.Dial("tcp", i.at(i.peers[n])); err == nil {
							c.Close()
							break
						}
						time.Sleep(5 * time.Millisecond)
					}
					away.Add(-1)
				})
			}
		})
	}
	now := func() string { mu.Lock(); defer mu.Unlock(); return ends }
	ended := func(want string) {
		t.Helper()
		for end := time.Now().Add(3 * patience); now() != want; time.Sleep(50 * time.Millisecond) {
			if !strings.HasPrefix(want, now()) || time.Now().After(end) {
				t.Fatalf("ended are %s, want %s", now(), want)
			}
		}
	}
	serve := func(key string) {
		t.Helper()
		for n := range i.peers {
			i.put(n, key, fmt.Sprint(n))
		}
	}
	serve("before")

	// A file without a CA, as of a Secret that somebody has emptied, ends nobody.
	i.write("egret-etcd-server", "ca.crt", nil)
	time.Sleep(4 * lookEvery)
	i.trust(first, next)
	ended("012")
	serve("trusted")
	i.issue(next, nextSigner)
	serve("of the next CA")

	// The first one has ended.
	i.trust(next)
	ended("012012")
	serve("alone")
	time.Sleep(4 * lookEvery)
	ended("012012")
}
