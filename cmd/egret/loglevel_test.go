package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/monitor"
)

func TestTheLevelOfARunningDaemonsLogIsChangedForAWhile(t *testing.T) {
	var out bytes.Buffer
	log, level, err := (&logFlags{"warn", "json"}).logger(&out)
	if err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	f := monitorFlags{monitor.Config{Local: address}}
	s, _ := f.server(slog.New(slog.DiscardHandler), level)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	defer func() { stop(); <-done }()
	ask := func(args ...string) string {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) { // it begins to listen
			got, err := run(t, append([]string{"log-level", "--status-address", address}, args...)...)
			if err == nil {
				return strings.TrimSpace(got)
			}
			if time.Now().After(end) {
				t.Fatal(got, err)
			}
		}
	}
	if got := ask(); got != "WARN" {
		t.Errorf("at the start it is %q, want WARN", got)
	}
	log.Info("not said")
	if got := ask("debug", "--for", "1h"); !strings.HasPrefix(got, "DEBUG until ") || !strings.HasSuffix(got, ", then WARN") {
		t.Errorf("set, it is %q", got)
	}
	log.Debug("said", "egress_ip", "10.0.0.1")
	var line struct{ Level, Msg, Egress_ip string }
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line.Level != "DEBUG" || line.Msg != "said" || line.Egress_ip != "10.0.0.1" {
		t.Errorf("logged %q, %v: want one line in JSON", out.String(), err)
	}
	for want, args := range map[string][]string{
		"invalid argument": {"loud"}, "--for 0s: want": {"debug", "--for", "0s"}, "--for 48h0m0s: want": {"debug", "--for", "48h"},
		"want a loopback address": {"--status-address", "192.0.2.1:8481"}, "another network namespace": {"--status-address", "127.0.0.1:1"},
	} {
		if got, err := run(t, append([]string{"log-level"}, args...)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %q, %v: want an error with %q", args, got, err, want)
		}
	}
	if level.Level() != slog.LevelDebug {
		t.Error("what was refused changed the level")
	}
	if _, _, err := (&logFlags{"loud", "xml"}).logger(&out); err == nil || !strings.Contains(err.Error(), "--log-level") || !strings.Contains(err.Error(), "--log-format") {
		t.Errorf("a level and a format that are none: %v, want both named", err)
	}
}
