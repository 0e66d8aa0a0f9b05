// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/moby/spdystream/spdy"
)

// spdySession is a SPDY/3.1 connection. The headers of its streams say what they carry.
type spdySession struct {
	observer observer
	status   bool   // errors are reported as a Status
	out      stream // for the text of the farewell
	// anyStream passes data on unknown streams.
	anyStream bool

	// framer reads the client's control frames from control. It is the parser of the API
	// server: the header blocks of all frames are compressed as one stream, so a parser
	// that reads one of them differently reads all later ones differently.
	framer  *spdy.Framer
	control bytes.Reader

	mu      sync.Mutex // the client opens streams while the server answers on others
	streams map[uint32]stream
}

const (
	spdyHeader = 8
	// Header blocks of kubectl hold two or three short headers.
	maxHeaderSize  = 1 << 12
	maxHeaderCount = 32

	flagFin = 1
)

func newSPDY(o observer) (*spdySession, error) {
	s := &spdySession{observer: o, streams: make(map[uint32]stream)}
	var err error
	s.framer, err = spdy.NewFramerWithOptions(io.Discard, &s.control,
		spdy.WithMaxHeaderFieldSize(maxHeaderSize), spdy.WithMaxHeaderCount(maxHeaderCount))
	return s, err
}

// spdyLength returns the length of the frame at the start of b, 0 if b does not hold
// all of it.
func spdyLength(b []byte) (int, error) {
	if len(b) < spdyHeader {
		return 0, nil
	}
	size := binary.BigEndian.Uint32(b[4:]) & 0xffffff
	if err := checkSize(uint64(size)); err != nil {
		return 0, err
	}
	if n := spdyHeader + int(size); n <= len(b) {
		return n, nil
	}
	return 0, nil
}

// spdyData returns the stream and the data of a data frame. ok is false for a control
// frame.
func spdyData(frame []byte) (id uint32, data []byte, ok bool) {
	id = binary.BigEndian.Uint32(frame)
	return id, frame[spdyHeader:], id&(1<<31) == 0
}

// carries returns what a stream carries.
func (s *spdySession) carries(id uint32) (stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	what, ok := s.streams[id]
	if !ok && !s.anyStream {
		return "", fmt.Errorf("data on the unknown stream %d", id)
	}
	return what, nil
}

func (s *spdySession) fromClient(b []byte) (int, error) {
	n, err := spdyLength(b)
	if n == 0 || err != nil {
		return 0, err
	}
	id, data, ok := spdyData(b[:n])
	if !ok {
		return n, s.clientControl(b[:n])
	}
	what, err := s.carries(id)
	if err != nil || len(data) == 0 {
		return n, err
	}
	return n, s.observer.fromClient(what, data)
}

// clientControl parses a control frame of the client.
func (s *spdySession) clientControl(b []byte) error {
	if version := binary.BigEndian.Uint16(b) & 0x7fff; version != spdy.Version {
		return fmt.Errorf("a frame of SPDY version %d", version)
	}
	s.control.Reset(b)
	frame, err := s.framer.ReadFrame()
	if err != nil {
		return fmt.Errorf("a SPDY frame that cannot be read: %w", err)
	}
	if s.control.Len() > 0 {
		// The API server would parse the rest as the next frame.
		return errors.New("a SPDY control frame that is longer than its content")
	}
	syn, ok := frame.(*spdy.SynStreamFrame)
	if !ok {
		return nil
	}
	what, err := s.observer.streamOpened(syn.Headers)
	if err != nil || s.anyStream {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id := uint32(syn.StreamId)
	if id >= 1<<31 {
		return fmt.Errorf("stream %d has a number that no frame can name", id)
	}
	if _, taken := s.streams[id]; taken {
		return fmt.Errorf("stream %d is opened twice", id)
	}
	for _, other := range s.streams {
		if other == what {
			return fmt.Errorf("a second stream of the type %q", what)
		}
	}
	s.streams[id] = what
	return nil
}

func (s *spdySession) fromServer(b []byte) (int, error) {
	n, err := spdyLength(b)
	if n == 0 || err != nil {
		return 0, err
	}
	id, data, ok := spdyData(b[:n])
	if !ok {
		if kind := spdy.ControlFrameType(binary.BigEndian.Uint16(b[2:])); kind == spdy.TypeSynStream {
			return 0, errors.New("a stream that the API server opened")
		}
		return n, nil
	}
	what, err := s.carries(id)
	if err != nil || len(data) == 0 {
		return n, err
	}
	return n, s.observer.fromServer(what, data)
}

func (s *spdySession) farewell(reason string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	var text, end, status []byte
	for id, what := range s.streams {
		if what == s.out {
			text = appendSPDY(text, id, 0, onTerminal(reason))
		}
		switch what {
		case stdout, stderr:
			end = appendSPDY(end, id, flagFin, nil)
		case errs:
			status = appendSPDY(status, id, flagFin, onErrorStream(reason, s.status))
		}
	}
	return append(append(text, end...), status...)
}

// appendSPDY appends a data frame to b.
func appendSPDY(b []byte, id uint32, flags byte, data []byte) []byte {
	size := len(data)
	b = binary.BigEndian.AppendUint32(b, id)
	b = append(b, flags, byte(size>>16&0xff), byte(size>>8&0xff), byte(size&0xff))
	return append(b, data...)
}
