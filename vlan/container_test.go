package vlan

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// A cleanup that looked for them in a mount that a privileged container does not have found nothing to mend, and said
// that nothing is left.
func TestSettingsThatAreNotThereAreNotTakenForThoseOfNobody(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "host/proc/sys/net")
	l, err := New(Config{Sysctl: dir})
	if err == nil {
		l.Close()
	}
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), dir) {
		t.Errorf("with settings in %s: %v, want it said that it is not there", dir, err)
	}
}

// The agent's container has two capabilities, /proc/sys read-only, and a mount of the node's /proc/sys/net, which it
// shows by another path: what is opened there is of the network namespace of who opens it.
func TestInAContainerTheSettingsAreWrittenToTheMount(t *testing.T) {
	netns.Enter(t)
	for line := range strings.Lines("ip link add eth0 type bridge\nip link set eth0 up\nip addr add fd10::101/64 dev eth0 nodad") {
		netns.Run(t, strings.TrimSpace(line))
	}
	sysctl := netns.Container(t, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/eth0/proxy_ndp", []byte("1"), 0); !errors.Is(err, unix.EROFS) {
		t.Fatalf("writing to /proc/sys: %v: this is no container", err)
	}
	e := netip.MustParseAddr("fd10::8")
	want := State{Addresses: []netip.Addr{e}, Answers: map[string][]netip.Addr{"eth0": {e}}}
	for _, dir := range []string{"", sysctl} {
		l, err := New(Config{Sysctl: dir})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if dir == "" {
			if err := l.Apply(Diff(observe(t, l), want)); !errors.Is(err, unix.EROFS) {
				t.Errorf("without the mount: %v, want it said that the settings are read-only", err)
			}
			continue
		}
		reach(t, l, want)
		if got := netns.Run(t, "sysctl -n net.ipv6.conf.eth0.proxy_ndp net.ipv6.neigh.eth0.proxy_delay"); got != "1\n0\n" {
			t.Errorf("the kernel answers with the settings %q", got)
		}
		// Who cannot write them leaves what tells that they are ours.
		without, err := New(Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer without.Close()
		for range 2 {
			if err := without.Delete(); !errors.Is(err, unix.EROFS) {
				t.Errorf("without the mount: %v, want it said that the settings are read-only", err)
			}
		}
		if err := l.Delete(); err != nil {
			t.Error(err)
		}
		if got := netns.Run(t, "sysctl -n net.ipv6.conf.eth0.proxy_ndp net.ipv6.neigh.eth0.proxy_delay"); got != "0\n80\n" {
			t.Errorf("left are the settings %q", got)
		}
	}
}
