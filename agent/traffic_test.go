package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
)

// Whoever asks how often: the kernel is read once a second.
func TestTrafficIsReadOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		read, booted := 0, time.Now().Add(-time.Hour)
		var fault error
		a := &trafficAnswerer{node: "a", now: func() (time.Duration, error) { return time.Since(booted), nil }, read: func() (map[netip.Addr]nft.Traffic, error) {
			read++
			return map[netip.Addr]nft.Traffic{netip.MustParseAddr("10.0.0.1"): {SentPackets: 1, SentBytes: uint64(100 * read), ReceivedPackets: 2, ReceivedBytes: 3}}, fault
		}}
		ask := func(query string) (int, string) {
			w := httptest.NewRecorder()
			a.ServeHTTP(w, httptest.NewRequest(http.MethodGet, TrafficPage+query, nil))
			return w.Code, w.Body.String()
		}
		for range 100 {
			code, got := ask("?node=a")
			var answer egress.NodeTraffic
			if err := json.Unmarshal([]byte(got), &answer); err != nil || code != http.StatusOK || answer.Node != "a" || answer.Read != time.Hour || answer.IPs[netip.MustParseAddr("10.0.0.1")] != (egress.Traffic{SentPackets: 1, SentBytes: 100, ReceivedPackets: 2, ReceivedBytes: 3}) {
				t.Fatalf("%d %s, %v", code, got, err)
			}
		}
		if code, got := ask("?node=b"); code != http.StatusOK || strings.Contains(got, "10.0.0.1") || !strings.Contains(got, `"a"`) {
			t.Errorf("asked as another node's: %d %s", code, got)
		}
		time.Sleep(trafficAge)
		if _, got := ask(""); read != 2 || !strings.Contains(got, "200") || !strings.Contains(got, fmt.Sprintf(`"read":%d`, time.Hour+trafficAge)) {
			t.Errorf("a second later: read %d times, %s", read, got)
		}
		time.Sleep(trafficAge)
		fault = errors.New("netlink: no")
		for range 10 {
			if code, got := ask(""); code != http.StatusInternalServerError || !strings.Contains(got, "netlink: no") || read != 3 {
				t.Errorf("%d %s, read %d times", code, got, read)
			}
		}
	})
}

func TestTheTimeSinceTheNodeBootedGoesOn(t *testing.T) {
	before, err1 := sinceBoot()
	time.Sleep(10 * time.Millisecond)
	after, err2 := sinceBoot()
	if err := errors.Join(err1, err2); err != nil || before <= 0 || after-before < 10*time.Millisecond {
		t.Errorf("%v, then %v: %v", before, after, err)
	}
}
