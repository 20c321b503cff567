package operator

import (
	"context"
	"errors"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"
)

// What others wrote into etcd gets into no line for a shell.
func TestCommandsForAShellAreOfPlainNames(t *testing.T) {
	to := netip.MustParseAddr("2001:db8::9")
	for _, tt := range []struct {
		q          Question
		node, want string
	}{
		{Question{Pod: "prod/web-1.a", To: to, Protocol: "tcp", Port: 443, Live: &Live{Protocol: 6, Port: 443}}, "node-1.example",
			"the agent of node-1.example is not reached from here: --agents-port asks it, or `kubectl exec -n n $(kubectl get pods -n n -o name " +
				"-l app.kubernetes.io/name=egret-agent --field-selector spec.nodeName=node-1.example) -- " +
				"egret trace prod/web-1.a --to 2001:db8::9 --protocol tcp --port 443`"},
		{Question{Pod: "prod/web-1"}, "x;reboot", "the agent of x;reboot is not reached from here: --agents-port asks it"},
		{Question{Pod: "prod/$(reboot)"}, "x", "the agent of x is not reached from here: --agents-port asks it"},
		{Question{Pod: "`reboot`/x"}, "x", "the agent of x is not reached from here: --agents-port asks it"},
	} {
		if got := tt.q.unasked([]string{"x"}); got != "the agent of x is not reached from here: --agents-port asks it" {
			t.Errorf("%+v, of no namespace: %q", tt.q, got)
		}
		tt.q.Namespace = "n"
		if got := tt.q.unasked([]string{tt.node}); got != tt.want {
			t.Errorf("%+v, %s: %q, want %q", tt.q, tt.node, got, tt.want)
		}
	}
}

func TestTraceNamesAgentsThatAreNotReached(t *testing.T) {
	for name, tt := range map[string]struct {
		q    Question
		to   error
		want string // in the last step
	}{
		"a pod of an egress":   {Question{Pod: "prod/web-1"}, ErrNoWay, "not asked: the agents of node-2 and node-1 are not reached from here"},
		"a pod of none":        {Question{Pod: "prod/db-1"}, ErrNoWay, "not asked: the agent of node-2 is not reached from here"},
		"agents that are deaf": {Question{Pod: "prod/web-1"}, errors.New("timeout"), "leaves: as 10.10.0.11 by gateway node-1"},
	} {
		ask := func(context.Context, string, []netip.Addr, string, url.Values, any) error { return tt.to }
		steps, err := trace(whole(), tt.q, time.Now(), askKernels(t.Context(), ask, "/kernel"))
		if err != nil {
			t.Fatal(err)
		}
		if last := steps[len(steps)-1]; !strings.HasPrefix(last.What+": "+last.Text, tt.want) || last.Fault != "" {
			t.Errorf("%s: the last step is %+v, want %s", name, last, tt.want)
		}
	}
}
