// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
)

// Config says how to run a machine.
type Config struct {
	// Name is the machine's hostname.
	Name string

	// Dir is the folder for the machine's /var/lib and /var/log, and for the logs of
	// what runs on it. It is created if necessary. When the machine stops, the logs
	// stay.
	Dir string

	// Files are files of the machine in place of this one's, by path.
	Files map[string]string
}

// Network says how this machine and the other one reach each other, and which
// addresses the other one's containers may have.
type Network struct {
	// Host is the address of this machine.
	Host netip.Addr
	// Machine is the address of the other one.
	Machine netip.Prefix
	// Containers are the addresses that this machine also sends to the other one.
	Containers netip.Prefix
}

// slots is how many machines may run at once. Each has addresses and names of its
// own, which are free again when it has ended.
const slots = 32

// network returns the network of a slot. The addresses are those that are reserved
// for tests of network devices (RFC 2544).
func network(slot int) Network {
	n := byte(slot) //nolint:gosec // less than slots
	return Network{
		Host:       netip.AddrFrom4([4]byte{198, 18, n, 1}),
		Machine:    netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, n, 2}), 24),
		Containers: netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 19, n, 0}), 24),
	}
}

// slotName is the name of what a slot has: interfaces and control groups.
func slotName(slot int) string { return fmt.Sprintf("labmachine%d", slot) }

// Command is a program to run on a machine.
type Command struct {
	Args []string // with the path of the program first
	Env  []string
	Log  string // the file that standard output and standard error are appended to
}

// Process is a program that runs on a machine.
type Process struct {
	name   string
	log    string
	done   chan struct{}
	status syscall.WaitStatus // set before done is closed
	err    error              // set before done is closed, if the program was not started
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns how the program ended: nil if with exit code 0. It waits until then.
func (p *Process) Err() error {
	<-p.done
	switch {
	case p.err != nil:
		return fmt.Errorf("%s: %w", p.name, p.err)
	case p.status.Exited() && p.status.ExitStatus() == 0:
		return nil
	case p.status.Exited():
		return fmt.Errorf("%s: exit code %d: %s (log: %s)", p.name, p.status.ExitStatus(), lastLine(p.log), p.log)
	}
	return fmt.Errorf("%s: %v: %s (log: %s)", p.name, p.status.Signal(), lastLine(p.log), p.log)
}

// lastLine returns the last line of a log, which usually says why a program ended.
func lastLine(path string) string {
	log, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	return lines[len(lines)-1]
}

// errEnded is the error of what was asked of a machine that has ended.
var errEnded = errors.New("the machine has ended")

// A request asks the init for something. Each has an ID of its own.
type request struct {
	ID      int
	Command *Command       // to run
	Signal  syscall.Signal // or to send to the process of the request with this ID
}

// An answer says what became of a request.
type answer struct {
	ID     int
	Status *syscall.WaitStatus // the program has ended
	Error  string              // or it could not be started
}

// setup is what guard and init have to know.
type setup struct {
	Config
	Slot    int
	Network Network
}

// encode returns s as an argument.
func (s setup) encode() string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // only strings and numbers
	}
	return string(b)
}
