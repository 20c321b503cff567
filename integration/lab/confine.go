package lab

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// AgentCapabilities are what the agents of a lab have, by the names that Kubernetes has for them: what the manifests
// give them. FastPathCapabilities are what those with --fast-path have beside these.
var (
	AgentCapabilities    = map[string]int{"NET_ADMIN": unix.CAP_NET_ADMIN, "NET_RAW": unix.CAP_NET_RAW}
	FastPathCapabilities = map[string]int{"BPF": unix.CAP_BPF, "PERFMON": unix.CAP_PERFMON}
)

// capabilities returns those of an agent that is called with argv, as the chart has it.
func capabilities(argv []string) []int {
	fast := false
	for _, arg := range argv {
		name, value, set := strings.Cut(arg, "=")
		if name == "--fast-path" {
			fast, _ = strconv.ParseBool(value) // what is neither, the agent refuses
			fast = fast || !set
		}
	}
	keep := slices.Collect(maps.Values(AgentCapabilities))
	if fast {
		keep = slices.AppendSeq(keep, maps.Values(FastPathCapabilities))
	}
	return keep
}

// sysctlDir is where a confined process of the lab has /proc/sys/net, in the lab's folder, which it starts in.
const sysctlDir = "sysctl"

// confine takes from the calling process, which has a mount namespace of its own and is about to become an agent, what
// the container of one has not: all capabilities but those to keep, ways to get them back, and to write to /proc/sys
// but by a mount of /proc/sys/net elsewhere.
func confine(keep []int) error {
	if err := os.Mkdir(sysctlDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	for _, m := range []struct {
		source, target string
		flags          uintptr
	}{
		{"/proc/sys/net", sysctlDir, unix.MS_BIND},
		{"/proc/sys", "/proc/sys", unix.MS_BIND},
		{"none", "/proc/sys", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		if err := unix.Mount(m.source, m.target, "", m.flags, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	for c := range unix.CAP_LAST_CAP + 1 { // what a program that root starts gets
		if slices.Contains(keep, c) {
			continue
		}
		// an older kernel has fewer
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("dropping capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("giving up further privileges: %w", err)
	}
	return nil
}
