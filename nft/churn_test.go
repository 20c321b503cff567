package nft

import (
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// closer is who ends a connection first, and so remembers it (TIME_WAIT).
type closer int

const (
	clientFirst closer = iota
	serverFirst
)

// churn opens connections from pod a to one destination for a while, so many a second, which end at once. It returns
// how many were opened, how many were not, and how many were not at the first try.
func (b *blockSite) churn(perSecond int, length time.Duration, first closer) (opened, failed, late int64) {
	b.t.Helper()
	var l net.Listener
	to := net.JoinHostPort(b.f.server, strconv.Itoa(7003))
	b.ext.do(func() (err error) { l, err = net.Listen("tcp", to); return err })
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				if first == clientFirst {
					_, _ = io.Copy(io.Discard, c) // until the client ends it
				}
				c.Close()
			}()
		}
	}()
	var good, bad, again atomic.Int64
	var workers sync.WaitGroup
	turns := make(chan struct{}, perSecond)
	for range 256 {
		workers.Go(func() {
			_ = netns.Do(b.pods["a"].name, func() error {
				for range turns {
					began := time.Now()
					c, err := net.DialTimeout("tcp", to, 8*time.Second)
					if time.Since(began) > 900*time.Millisecond {
						again.Add(1) // TCP sends the first packet again after a second
					}
					if err != nil {
						bad.Add(1)
						continue
					}
					good.Add(1)
					if first == serverFirst {
						_, _ = io.Copy(io.Discard, c)
					}
					c.Close()
				}
				return nil
			})
		})
	}
	began := time.Now()
	for n := 0; ; n++ {
		if at := time.Duration(n) * time.Second / time.Duration(perSecond); at > length {
			break
		} else if wait := at - time.Since(began); wait > 0 {
			time.Sleep(wait)
		}
		turns <- struct{}{}
	}
	close(turns)
	workers.Wait()
	b.t.Logf("%d connections opened in %v, %d failed, %d late", good.Load(), time.Since(began), bad.Load(), again.Load())
	return good.Load(), bad.Load(), again.Load()
}

// sized gives the nodes blocks of so many ports.
func (b *blockSite) sized(size int) {
	b.t.Helper()
	b.mangle = func(n int, s *State) {
		s.Blocks = map[egress.ID]egress.Block{blockID: {IP: b.f.egressIP(), First: b.block(n).First, Size: size}}
		for i := range s.Ports {
			s.Ports[i].Size = size
		}
	}
	b.reach()
}

// Connections that have ended fail no new ones: conntrack remembers them for two minutes, and the kernel takes their
// ports when it needs some, since Linux 6.6. A server that has ended them itself remembers them, too, and may answer
// the next one of a port at the second try only.
func TestShortConnectionsBeyondTheBlockAllOpen(t *testing.T) {
	if testing.Short() || !conntrack.ReusesPorts() {
		t.Skip("an emulated machine, or a kernel before Linux 6.6")
	}
	for who, first := range map[string]closer{"the client ends them": clientFirst, "the server ends them": serverFirst} {
		t.Run(who, func(t *testing.T) {
			b := newBlockSite(t, bothSides[0])
			b.sized(1024)
			began, length := time.Now(), 3*time.Second
			opened, failed, _ := b.churn(2000, length, first)
			may := int64(0)
			if first == serverFirst || time.Since(began) > 2*length {
				// the server's own memory of them, which no block cures; or a machine that has not kept up
				may = opened / 100
			}
			if failed > may || opened < 4000 {
				t.Errorf("%d connections failed, %d opened", failed, opened)
			}
			if counted, err := b.nodes[1].tables.Opened(); err != nil || int64(counted[blockID]) < opened {
				t.Errorf("%v are counted, error %v; %d were opened", counted, err, opened)
			}
		})
	}
}

// The kernel takes the ports of connections that have ended, or it does not, as conntrack.ReusesPorts says: the agent
// counts what is in use by that.
func TestPortsOfEndedConnectionsAreTakenWhereTheKernelDoesThat(t *testing.T) {
	b := newBlockSite(t, bothSides[0]) // with 64 ports
	accepted := b.listenTCP(7005)
	go func() {
		for c := range accepted {
			go func() {
				_, _ = io.Copy(io.Discard, c) // until the pod ends it
				c.Close()
			}()
		}
	}()
	b.pods["a"].ok("ping -c1 -w3 " + b.f.server) // so that the neighbours are known
	to, failed := net.JoinHostPort(b.f.server, "7005"), 0
	b.pods["a"].do(func() error {
		for n := 0; n < 80 && failed < 10; n++ {
			c, err := net.DialTimeout("tcp", to, 1500*time.Millisecond) // two tries
			if err != nil {
				failed++
				continue
			}
			b.line(c)
			c.Close()
		}
		return nil
	})
	if want := conntrack.ReusesPorts(); (failed == 0) != want {
		t.Errorf("%d connections failed after 64 that have ended; the kernel is taken for one that reuses ports: %t", failed, want)
	}
}

// Long-lived connections open at the first try until more than three quarters of the ports are in use: the kernel tries
// some 240 ports of a large block, and may find none that is free long before all are taken. So that is where the node
// asks for more.
func TestLongConnectionsOpenUntilThreeQuartersOfTheBlockAreInUse(t *testing.T) {
	b := newBlockSite(t, bothSides[0])
	b.sized(1024)
	b.listenTCP(7004)
	b.pods["a"].ok("ping -c1 -w3 " + b.f.server) // so that the neighbours are known
	to := net.JoinHostPort(b.f.server, "7004")
	const failures = 5
	opened, first, failed := 0, 0, 0
	b.pods["a"].do(func() error {
		for n := 1; failed < failures && n < 1100; n++ {
			c, err := net.DialTimeout("tcp", to, 900*time.Millisecond) // TCP asks again after a second
			if err != nil {
				if failed++; first == 0 {
					first = n
				}
				continue
			}
			b.t.Cleanup(func() { c.Close() })
			opened++
		}
		return nil
	})
	t.Logf("%d connections at a time, of 1024; the first that failed was no. %d", opened, first)
	if first <= 800 || opened > 1024 || failed < failures {
		t.Errorf("%d connections are open, the first that failed was no. %d, %d failed: want none of the first 800, and 1024 at most", opened, first, failed)
	}
}

// A connection that finds no port tries again by itself, and gets one of the larger block that the node has by then.
func TestAConnectionThatFoundNoPortGetsOneOfTheNextBlock(t *testing.T) {
	b := newBlockSite(t, bothSides[0]) // with 64 ports
	b.listenTCP(7006)
	b.pods["a"].ok("ping -c1 -w3 " + b.f.server) // so that the neighbours are known
	for range 64 {
		b.dial("a", 0, 7006)
	}
	opened := make(chan error)
	go func() {
		opened <- netns.Do(b.pods["a"].name, func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(b.f.server, "7006"), 10*time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
	}()
	select {
	case err := <-opened:
		t.Fatalf("opened with the 65th port of 64, or failed at once: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	b.sized(128)
	if err := <-opened; err != nil {
		t.Error(err)
	}
}
