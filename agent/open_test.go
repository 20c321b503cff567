package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

func TestOpenConnectionsAreThoseOfThisNodesPods(t *testing.T) {
	netns.Enter(t)
	const id, other = egress.ID(5), egress.ID(6)
	connect := func(source netip.Addr, protocol string, id egress.ID, port int) {
		t.Helper()
		netns.Run(t, fmt.Sprintf("conntrack -I -t 600 -s %s -d 203.0.113.10 %s --sport %d --dport 53 -m %d --src-nat 192.0.2.11", source, protocol, port, id.ConnMark()))
	}
	pod, like := netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("192.0.2.11")
	connect(pod, "-p udp", id, 1)
	connect(pod, "-p tcp --state ESTABLISHED", id, 2)
	connect(pod, "-p tcp --state TIME_WAIT", id, 3)
	connect(egress.OverlaySource(2, id, like), "-p udp", id, 4) // of another node's pod
	connect(pod, "-p udp", other, 5)
	got, err := conntrack.CountByID(openHere)
	if err != nil || len(got) != 2 || got[id] != 2 || got[other] != 1 {
		t.Errorf("open are %v, %v; want 2 of id 5 and 1 of id 6", got, err)
	}
}

func TestOpenConnectionsAreCountedBesideWhoAsksAndNotTooOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		takes, counts, fault := time.Second, 0, error(nil)
		o := &openConnections{log: slog.New(slog.DiscardHandler), count: func() (map[egress.ID]int, error) {
			counts++
			time.Sleep(takes)
			if fault != nil {
				return nil, fault
			}
			return map[egress.ID]int{5: counts}, nil
		}}
		is := func(what string, want, of int) {
			t.Helper()
			if got := o.counts(); got[5] != want {
				t.Errorf("%s: %v, want %d", what, got, want)
			}
			if synctest.Wait(); counts != of {
				t.Errorf("%s: counted %d times, want %d", what, counts, of)
			}
		}
		is("at first", 0, 1)
		is("while that goes on", 0, 1)
		time.Sleep(takes + time.Millisecond)
		is("then", 1, 1)
		time.Sleep(openShare*takes - time.Second)
		is("before it rested", 1, 1)
		time.Sleep(time.Second)
		takes, fault = 0, errors.New("no")
		is("after", 1, 2)
		is("what could not be counted is not told", 0, 2)
		time.Sleep(openEvery)
		fault = nil
		is("later", 0, 3)
		is("then", 3, 3)
	})
}
