package monitor

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/port"
)

func tells(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, text, r.URL.RawQuery) })
}

// askSocket asks at a unix socket, by a connection that as makes.
func askSocket(name, path string, as func(func())) (text string, err error) {
	var c net.Conn
	as(func() { c, err = net.Dial("unix", name) })
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.0\r\n\r\n", path); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

func TestPagesAboutPodsAreServedToRootAlone(t *testing.T) {
	need.Root(t)
	name := fmt.Sprintf("@egret/test-%d", os.Getpid())
	l, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := New(Config{Local: fmt.Sprintf("127.0.0.1:%d", port.Hold(t))})
	s.Page("/connections", tells("pods "))
	run(t, s)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.ServeRoot(ctx, l) }()
	self := func(f func()) { f() }
	if got, err := askSocket(name, "/connections?a=b", self); err != nil || !strings.Contains(got, "pods a=b") || !strings.Contains(got, "no-store") {
		t.Errorf("root: %q, %v", got, err)
	}
	if got, err := askSocket(name, "/metrics", self); err != nil || !strings.Contains(got, "404") {
		t.Errorf("another page: %q, %v", got, err)
	}
	nobody := func(f func()) {
		ended := make(chan bool)
		go func() {
			defer close(ended)
			runtime.LockOSThread() // the thread ends with the goroutine, and what it is with it
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
				t.Error(errno)
			}
			f()
		}()
		<-ended
	}
	if got, err := askSocket(name, "/connections", nobody); strings.Contains(got, "pods") {
		t.Errorf("an unprivileged process of the node's network is told %q, %v", got, err)
	}
	await(t, func() bool { _, _, err := get(s.Local, "/healthz"); return err == nil })
	if code, got, err := get(s.Local, "/connections"); err != nil || code != http.StatusNotFound {
		t.Errorf("at the loopback address, which any process may ask: %d %q, %v", code, got, err)
	}
	for range 3 * maxRoot { // who holds connections keeps nobody from answers
		c, err := net.Dial("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if got, err := askSocket(name, "/connections", self); err != nil || !strings.Contains(got, "pods") {
		t.Errorf("beside connections that say nothing: %q, %v", got, err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if again, err := net.Listen("unix", name); err == nil {
		again.Close()
		t.Error("the socket was closed: it is what keeps a second agent off the node")
	}
}

// An attempt: crdsync, whose page shows traces, is broken into, and asks who spoke with whom.
func TestWhoMayTraceIsToldNothingElse(t *testing.T) {
	ca := newAuthority(t)
	for name, tt := range map[string]struct {
		readers, tracers []string
		trace, who       int
	}{
		"by no name":           {nil, nil, http.StatusNotFound, http.StatusNotFound},
		"by a name for traces": {nil, []string{"prometheus"}, http.StatusOK, http.StatusNotFound},
		"by it, and another":   {[]string{"auditor"}, []string{"prometheus"}, http.StatusOK, http.StatusForbidden},
		"by a name for all":    {[]string{"prometheus"}, nil, http.StatusOK, http.StatusOK},
		"by another's names":   {[]string{"auditor"}, []string{"egret-crdsync"}, http.StatusForbidden, http.StatusForbidden},
	} {
		cfg := Config{Remote: fmt.Sprintf("127.0.0.1:%d", port.Hold(t)), TLS: ca.files(t, "egret"), Metrics: newGatherer(), Readers: tt.readers, Tracers: tt.tracers}
		s := New(cfg)
		s.Page("/connections", tells("pods"))
		s.Trace("/kernel", tells("pods"))
		run(t, s)
		c := ca.client(t, &ca, time.Now().Add(time.Hour)) // it is prometheus
		await(t, func() bool { _, _, err := ask(c, "https://"+cfg.Remote+"/metrics"); return err == nil })
		for path, want := range map[string]int{"/kernel": tt.trace, "/connections": tt.who, "/live": tt.who} {
			if want == http.StatusOK && path == "/live" { // which is not registered here
				want = http.StatusNotFound
			}
			code, got, err := ask(c, "https://"+cfg.Remote+path)
			if err != nil || code != want || strings.Contains(got, "pods") != (want == http.StatusOK) {
				t.Errorf("%s: %s: %d %q, %v; want %d", name, path, code, got, err, want)
			}
		}
		if none := ca.client(t, nil, time.Now()); len(tt.tracers) > 0 {
			if _, got, err := ask(none, "https://"+cfg.Remote+"/kernel"); err == nil {
				t.Errorf("%s: who shows no certificate is told %q", name, got)
			}
		}
	}
}

// TestOthersAskAboutPodsByANamedCertificate: who may read metrics may not know who spoke with whom.
func TestOthersAskAboutPodsByANamedCertificate(t *testing.T) {
	ca := newAuthority(t)
	for name, want := range map[string]int{"": http.StatusNotFound, "auditor": http.StatusForbidden, "prometheus": http.StatusOK} {
		cfg := Config{Remote: fmt.Sprintf("127.0.0.1:%d", port.Hold(t)), TLS: ca.files(t, "egret"), Metrics: newGatherer()}
		if name != "" {
			cfg.Readers = []string{name}
		}
		s := New(cfg)
		s.Page("/connections", tells("pods"))
		s.Share("/traffic", tells("counts"))
		run(t, s)
		c := ca.client(t, &ca, time.Now().Add(time.Hour)) // it is prometheus
		await(t, func() bool { _, _, err := ask(c, "https://"+cfg.Remote+"/metrics"); return err == nil })
		code, got, err := ask(c, "https://"+cfg.Remote+"/connections")
		if err != nil || code != want || strings.Contains(got, "pods") != (want == http.StatusOK) {
			t.Errorf("--who-clients %q: %d %q, %v; want %d", name, code, got, err, want)
		}
		if code, got, err := ask(c, "https://"+cfg.Remote+"/traffic"); err != nil || code != http.StatusOK || !strings.Contains(got, "counts") {
			t.Errorf("--who-clients %q: what metrics tell as well: %d %q, %v", name, code, got, err)
		}
		none := ca.client(t, nil, time.Now())
		if _, got, err := ask(none, "https://"+cfg.Remote+"/traffic"); err == nil || strings.Contains(got, "counts") {
			t.Errorf("who shows no certificate is told %q, %v", got, err)
		}
		if _, got, err := ask(none, "https://"+cfg.Remote+"/connections"); err == nil {
			t.Errorf("without a certificate: %q", got)
		}
	}
}
