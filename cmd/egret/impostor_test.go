package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/natlog"
	"github.com/egret-project/egret/operator"
)

// A process of the node without rights has taken the agent's socket while there was no agent, and names a pod of others
// for each port. Root does not hear it.
func TestRootBelievesNoProcessThatIsNoAgent(t *testing.T) {
	need.Root(t)
	was := agentSocket
	agentSocket = fmt.Sprintf("@egret/test-%d-impostor", os.Getpid())
	t.Cleanup(func() { agentSocket = was })
	taken := make(chan net.Listener)
	go func() {
		runtime.LockOSThread() // which ends with the goroutine
		const nobody = 65534
		_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody)
		l, err := net.Listen("unix", agentSocket)
		if errno != 0 || err != nil {
			t.Errorf("listening as another user: %v, %v", errno, err)
		}
		taken <- l
	}()
	l := <-taken
	if t.Failed() {
		t.FailNow()
	}
	served := make(chan error)
	go func() {
		served <- http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			uses := []natlog.Line{{Node: "n1", PodNamespace: "prod", PodName: "web-1"}}
			_ = json.NewEncoder(w).Encode(natlog.Reply{Node: r.URL.Query().Get("node"), Answer: natlog.Answer{Uses: uses}})
		}))
	}()
	t.Cleanup(func() { l.Close(); <-served })
	ask, err := new(agentsFlags).ask()
	if err != nil {
		t.Fatal(err)
	}
	var reply natlog.Reply
	err = ask(t.Context(), "n1", []netip.Addr{netip.MustParseAddr("192.0.2.1")}, agent.ConnectionsPage, url.Values{}, &reply)
	if !errors.Is(err, operator.ErrNoWay) || len(reply.Uses) > 0 {
		t.Errorf("the answer is %+v, error %v; want that there is no way to ask the agent", reply, err)
	}
}
