package agent

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/natlog"
)

// translated sets up a namespace in which each connection to port 7000 of 127.1.0.0/16 is one of an egress, translated
// to its IP, and counts them.
func translated(t testing.TB) {
	t.Helper()
	for _, line := range []string{
		"add table inet t", "add counter inet t opened",
		"add chain inet t out { type filter hook output priority 0 ; }",
		fmt.Sprintf("add rule inet t out ip daddr 127.1.0.0/16 ct state new ct mark set %d counter name opened", egress.ID(5).ConnMark()),
		"add chain inet t post { type nat hook postrouting priority -199 ; }",
		"add rule inet t post ip daddr 127.1.0.0/16 meta l4proto tcp snat ip to 203.0.113.5:2048-65535",
	} {
		netns.Run(t, "nft "+line)
	}
	netns.RunAll(t, "", "ip addr add 203.0.113.5/32 dev lo")
}

// openConnections opens connections, so many a second (0: as many as can be), and ends them at once, for a while. It
// returns how many were opened.
func (l *logged) openConnections(perSecond int, length time.Duration) (opened int64) {
	const workers = 4
	var n atomic.Int64
	listening := -1
	l.inside(func() {
		var err error
		if listening, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
			err = errors.Join(unix.SetsockoptInt(listening, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(listening, &unix.SockaddrInet4{Port: 7000}), unix.Listen(listening, 4096))
		}
		if err != nil {
			l.t.Error(err)
		}
	})
	var servers, clients sync.WaitGroup
	servers.Go(func() {
		for {
			fd, _, err := unix.Accept4(listening, unix.SOCK_CLOEXEC)
			if err == nil {
				_ = unix.Close(fd)
			} else if errors.Is(err, unix.EINVAL) { // shut down
				return
			}
		}
	})
	end := time.Now().Add(length)
	for w := range workers {
		clients.Go(func() {
			l.inside(func() {
				to := unix.SockaddrInet4{Port: 7000, Addr: [4]byte{127, 1, byte(w), 1}}
				begun := time.Now()
				for i := 0; ; i++ {
					now := time.Now()
					if now.After(end) {
						return
					}
					if perSecond > 0 {
						if due := begun.Add(time.Duration(i) * workers * time.Second / time.Duration(perSecond)); now.Before(due) {
							time.Sleep(due.Sub(now))
						}
					}
					to.Addr[3]++ // there are enough ports
					fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
					if err != nil {
						l.t.Error(err)
						return
					}
					if unix.Connect(fd, &to) == nil {
						n.Add(1)
					}
					_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
					_ = unix.Close(fd)
				}
			})
		})
	}
	clients.Wait()
	_ = unix.Shutdown(listening, unix.SHUT_RDWR)
	servers.Wait()
	_ = unix.Close(listening)
	return n.Load()
}

// processor returns how much CPU this process has taken.
func processor(t testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkNATLog opens connections of an egress, 10,000 a second and as many as can be, with and without a log by
// turns.
func BenchmarkNATLog(b *testing.B) {
	for _, perSecond := range []int{10_000, 0} {
		b.Run(fmt.Sprintf("perSecond=%d", perSecond), func(b *testing.B) {
			l := newLogged(b, NATLog{})
			l.size = 1 << 12
			l.every = listEvery
			translated(b)
			// short ones by turns: whatever else the machine does meets both alike
			const rounds, length = 12, time.Second
			var opened [2]int64
			var took [2]time.Duration
			var fewer []float64
			last := int64(0)
			for b.Loop() {
				for round := range 2 * rounds {
					with := round % 2
					netns.Run(b, "conntrack -F")
					if with == 1 {
						l.start()
					}
					runtime.GC()
					before := processor(b)
					n := l.openConnections(perSecond, length)
					if opened[with] += n; with == 1 {
						fewer = append(fewer, 100*(1-float64(n)/float64(last)))
					}
					last = n
					took[with] += processor(b) - before
					if with == 1 {
						l.stop()
					}
				}
			}
			lost, lines := 0, 0
			for _, is := range l.lines() {
				lost += int(is.Lost)
				if is.Event == natlog.New {
					lines++
				}
			}
			seconds := float64(b.N) * rounds * length.Seconds()
			b.ReportMetric(float64(opened[0])/seconds, "without/s")
			b.ReportMetric(float64(opened[1])/seconds, "with/s")
			b.ReportMetric(100*(1-float64(opened[1])/float64(opened[0])), "%fewer")
			slices.Sort(fewer)
			b.ReportMetric(fewer[len(fewer)/2], "%fewer-median")
			b.ReportMetric(float64(lost), "lost")
			b.ReportMetric(float64(lines)-float64(opened[1]), "logged-above-opened")
			b.ReportMetric(float64(took[1])/float64(opened[1])/1000-float64(took[0])/float64(opened[0])/1000, "us-more/connection")
			b.ReportMetric(0, "ns/op")
		})
	}
}
