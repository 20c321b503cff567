package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/port"
)

// A daemon that has not begun has no checks of its own: a kubelet must not take that for readiness, or a rollout would
// go on without etcd.
func TestADaemonWithoutEtcdIsAliveAndNotReady(t *testing.T) {
	p := port.Hold(t)
	ctx, cancel := context.WithCancel(t.Context())
	c := root()
	c.SetArgs([]string{"crdsync", "--master", "http://127.0.0.1:1", "--endpoints", "127.0.0.1:1", "--insecure", "--dial-timeout", "300ms", "--status-address", fmt.Sprint("127.0.0.1:", p)})
	ended := make(chan struct{})
	go func() {
		_ = c.ExecuteContext(ctx) // it ends with the context's error
		close(ended)
	}()
	defer func() {
		cancel()
		<-ended
	}()
	get := func(path string) (int, string) {
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", p, path))
			if err == nil {
				b, _ := io.ReadAll(r.Body) // what is missing of it shows below
				r.Body.Close()
				return r.StatusCode, string(b)
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	}
	if code, text := get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "etcd") {
		t.Errorf("/readyz is %d %q: want 503 and etcd named", code, text)
	}
	if code, text := get("/healthz"); code != http.StatusOK {
		t.Errorf("/healthz is %d %q: a restart brings no etcd", code, text)
	}
}
