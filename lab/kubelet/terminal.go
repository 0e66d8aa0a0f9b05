// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"errors"
	"os"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// openTerminal opens a new terminal. Bytes written to terminal are input, and output
// can be read from it. tty is for the command.
func openTerminal() (terminal, tty *os.File, err error) {
	blocking, tty, err := pty.Open()
	if err != nil {
		return nil, nil, err
	}
	defer blocking.Close()
	// Reading a file in blocking mode cannot be interrupted, not even by closing it.
	// A file cannot leave that mode, so open a new one.
	fd, err := unix.FcntlInt(blocking.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, nil, errors.Join(err, tty.Close())
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, nil, errors.Join(err, unix.Close(fd), tty.Close())
	}
	return os.NewFile(uintptr(fd), blocking.Name()), tty, nil
}

// resizeTerminal gives terminal the given size.
func resizeTerminal(terminal *os.File, size remotecommand.TerminalSize) error {
	raw, err := terminal.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Control(func(fd uintptr) {
		result = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	})
	return errors.Join(err, result)
}
