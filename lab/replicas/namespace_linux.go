// SPDX-License-Identifier: Apache-2.0

package replicas

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/netns"
)

// ownCaddy is the environment variable that makes a program a Caddy.
const ownCaddy = "LAB_REPLICAS_CADDY"

// BeCaddy runs Caddy if this process was started as a replica, and reports that. The main
// function of a program that starts replicas begins with it.
func BeCaddy() bool {
	if os.Getenv(ownCaddy) == "" {
		return false
	}
	caddycmd.Main()
	return true
}

// Inside reports whether this process was started by a [Command].
func Inside() bool { return netns.Inside() }

// Command returns a command that runs this program again, with other arguments, in
// namespaces of its own for the network and for mounts, for [SetUp].
func Command(args ...string) *exec.Cmd {
	cmd := netns.Command(args...)
	cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNS
	return cmd
}

// Unavailable returns why a machine cannot be put on the tailnet here, nil if it can. The
// arguments are some with which this program does nothing.
func Unavailable(nothing ...string) error {
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("tailscaled needs a network interface: %w", err)
	}
	_ = tun.Close()
	if err := Command(nothing...).Run(); err != nil {
		return fmt.Errorf("cannot create namespaces: %w", err)
	}
	return nil
}

// SetUp sets up the namespaces of a [Command], with an /etc of its own: tailscaled writes the
// DNS settings of the machine. What is written there is kept in memory, below dir.
func SetUp(dir string) error {
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil { // before the first node
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keeping mounts to the namespace: %w", err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mounting a tmpfs: %w", err)
	}
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := syscall.Mount("overlay", "/etc", "overlay", 0, "lowerdir=/etc,upperdir="+upper+",workdir="+work); err != nil {
		return fmt.Errorf("mounting an /etc of its own: %w", err)
	}
	return netns.SetUp()
}
