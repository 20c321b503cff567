package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func messages(c Changes) (n int) {
	for _, o := range c.ops {
		n += len(o.msgs)
	}
	return n
}

// A node's agent starts on a node without tables: 500 pods, each with an egress IP of its own.
func BenchmarkLoad500PodsFromNothing(b *testing.B) {
	tables := open(b)
	want := large(500)
	var c Changes
	for b.Loop() {
		b.StopTimer()
		if err := tables.Delete(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		c = Diff(observe(b, tables), want)
		if err := tables.Apply(c); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(messages(c)), "messages/op")
}

// A pod starts on a node that has 500: compare and write, with the tables read anew each time, or with what is known of
// them.
func BenchmarkOneMorePod(b *testing.B) {
	b.Run("read", func(b *testing.B) { benchmarkOneMorePod(b, false) })
	b.Run("known", func(b *testing.B) { benchmarkOneMorePod(b, true) })
}

func benchmarkOneMorePod(b *testing.B, watched bool) {
	tables := open(b)
	want := large(500)
	reach(b, tables, want)
	if watched {
		watch(b, tables)
	}
	pod := netip.MustParseAddr("10.244.255.1")
	var c Changes
	for i := 0; b.Loop(); i++ {
		if i%2 == 0 {
			want.Pods[pod] = 5
		} else {
			delete(want.Pods, pod)
		}
		c = Diff(observe(b, tables), want)
		if err := tables.Apply(c); err != nil {
			b.Fatal(err)
		}
	}
	one := b.Elapsed() / time.Duration(b.N)
	b.ReportMetric(float64(messages(c)), "messages/op")

	// The alternative: all anew, without a look at what is there.
	const reloads = 10
	begin := time.Now()
	for range reloads {
		c = Diff(Observed{}, want)
		if err := errors.Join(tables.Delete(), tables.Apply(c)); err != nil {
			b.Fatal(err)
		}
	}
	reload := time.Since(begin) / reloads
	b.ReportMetric(float64(messages(c)), "messages/reload")
	b.ReportMetric(float64(reload), "ns/reload")
	b.ReportMetric(float64(reload)/float64(one), "reload/op")
}

// BenchmarkRenewal renews the permits of a gateway: by a commit, and without one. Of either there are eight in a
// second, with permits of 500 ms.
func BenchmarkRenewal(b *testing.B) {
	for _, n := range []int{1, 255} {
		tables := open(b)
		want := large(500)
		want.Renewal = NewRenewal(10*time.Second, 10*time.Second)
		reach(b, tables, want)
		var list []Permit
		for ip := ip4; len(list) < n; ip = ip.Next() {
			list = append(list, Permit{IP: ip, Answer: true})
		}
		for _, tt := range []struct {
			name  string
			renew func() error
		}{
			{"commit", func() error { return tables.Permit(list, 5*time.Second) }},
			{"frames", func() error {
				_, err := tables.Renew(want.Renewal, list, func() (time.Duration, error) { return 5 * time.Second, nil })
				return err
			}},
		} {
			b.Run(fmt.Sprintf("%s/ips=%d", tt.name, n), func(b *testing.B) {
				var before, after unix.Rusage
				if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
					b.Fatal(err)
				}
				for b.Loop() {
					if err := tt.renew(); err != nil {
						b.Fatal(err)
					}
				}
				if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
					b.Fatal(err)
				}
				cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
				b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}

// A pod comes or goes somewhere in a cluster whose pods have addresses without a range: each is an exception of its
// own.
func BenchmarkOneMoreException(b *testing.B) {
	for _, n := range []int{0, 1000, 10000, 50000} {
		b.Run(fmt.Sprint("beside-", n), func(b *testing.B) {
			tables := open(b)
			want := large(500)
			ip := netip.MustParseAddr("100.64.0.1")
			for range n {
				want.Except = append(want.Except, netip.PrefixFrom(ip, 32))
				ip = ip.Next().Next() // no two are one range
			}
			reach(b, tables, want)
			had := want.Except
			for i := 0; b.Loop(); i++ {
				if want.Except = had; i%2 == 0 {
					want.Except = append(slices.Clone(had), netip.PrefixFrom(ip, 32))
				}
				if err := tables.Apply(Diff(observe(b, tables), want)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
