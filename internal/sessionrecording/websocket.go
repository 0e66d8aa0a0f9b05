// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
)

// webSocket is a WebSocket (RFC 6455) on which every message starts with the number
// of a channel.
type webSocket struct {
	whole  bool // messages do not, and are one stream
	base64 bool // text: a digit and base64
	closes bool // there are messages that close a channel
	status bool // errors are reported as a Status
	// channel returns what a channel carries, and whether there is such a one.
	channel func(number byte) (stream, bool)
	// out is the channel for the farewell's text, errors that of its Status, each
	// noChannel if there is none.
	out, errors byte

	observer observer
	client   message
	server   message
}

// message is what is known of the message whose frames are arriving.
type message struct {
	unfinished bool
	begun      bool // its stream is known
	stream     stream
}

const (
	opContinuation = 0
	opText         = 1
	opBinary       = 2
	opClose        = 8
	opPing         = 9
	opPong         = 10

	// closeChannel is the number of no channel, but of messages that close one.
	closeChannel = 255
	noChannel    = closeChannel

	// What the channels of exec and attach carry.
	stdin  stream = "stdin"
	stdout stream = "stdout"
	stderr stream = "stderr"
	errs   stream = "error"
	resize stream = "resize"
)

// sessionChannels are the channels of exec and attach.
func sessionChannels(number byte) (stream, bool) {
	streams := [...]stream{stdin, stdout, stderr, errs, resize}
	if int(number) >= len(streams) {
		return "", false
	}
	return streams[number], true
}

// wsFrame is a frame of a WebSocket.
type wsFrame struct {
	final  bool
	opcode byte
	mask   []byte // nil if there is none
	data   []byte // masked
	length int    // of the frame
}

// parseWSFrame returns the frame at the start of b, with length 0 if b does not hold
// all of it.
func parseWSFrame(b []byte) (f wsFrame, err error) {
	if len(b) < 2 {
		return f, nil
	}
	if b[0]&0x70 != 0 {
		return f, errors.New("a WebSocket frame with bits that are reserved for extensions")
	}
	f.final, f.opcode = b[0]&0x80 != 0, b[0]&0x0f
	masked := b[1]&0x80 != 0
	size := uint64(b[1] & 0x7f)
	header := 2
	switch size {
	case 126:
		header += 2
		if len(b) < header {
			return f, nil
		}
		size = uint64(binary.BigEndian.Uint16(b[2:]))
	case 127:
		header += 8
		if len(b) < header {
			return f, nil
		}
		size = binary.BigEndian.Uint64(b[2:])
	}
	if f.opcode >= opClose && (!f.final || size > 125) {
		return f, errors.New("a WebSocket control frame that is too long or not the last of its message")
	}
	if size > maxFrame {
		return f, fmt.Errorf("a WebSocket frame of %d bytes, where %d are the limit", size, maxFrame)
	}
	if masked {
		header += 4
	}
	if uint64(len(b)) < uint64(header)+size {
		return f, nil
	}
	if masked {
		f.mask = b[header-4 : header]
	}
	f.length = header + int(size)
	f.data = b[header:f.length]
	return f, nil
}

// unmasked returns a copy of a frame's data from the given offset on.
func (f *wsFrame) unmasked(offset int) []byte {
	data := make([]byte, len(f.data)-offset)
	for i := range data {
		data[i] = f.data[offset+i] ^ f.mask[(offset+i)&3]
	}
	return data
}

// next parses the frame at the start of b and notes in m where its message is. It
// returns where in the frame's data the stream's begins; -1 if the frame holds none
// of it.
func (w *webSocket) next(m *message, b []byte, fromClient bool) (f wsFrame, offset int, err error) {
	f, err = parseWSFrame(b)
	if err != nil || f.length == 0 {
		return f, -1, err
	}
	if (f.mask != nil) != fromClient {
		return f, -1, errors.New("a WebSocket frame that is masked and must not be, or the other way round")
	}
	switch f.opcode {
	case opClose, opPing, opPong:
		return f, -1, nil
	}
	// Kubernetes takes each frame for a message of its own.
	if fromClient && !w.whole && (!f.final || f.opcode == opContinuation) {
		return f, -1, errors.New("a WebSocket message that is sent in parts")
	}
	switch f.opcode {
	case opContinuation:
		if !m.unfinished {
			return f, -1, errors.New("a WebSocket frame that continues no message")
		}
		if w.base64 {
			return f, -1, errors.New("a message in base64 that is sent in parts")
		}
	case opText, opBinary:
		if m.unfinished {
			return f, -1, errors.New("a WebSocket message within another")
		}
		*m = message{begun: w.whole}
	default:
		return f, -1, fmt.Errorf("a WebSocket frame with the unknown opcode %d", f.opcode)
	}
	m.unfinished = !f.final
	switch {
	case len(f.data) == 0:
		return f, -1, nil
	case m.begun:
		return f, 0, nil
	}
	// The first byte of a message is the number of its channel.
	number := f.data[0]
	if f.mask != nil {
		number ^= f.mask[0]
	}
	m.begun = true
	if fromClient && w.closes && number == closeChannel {
		m.stream = stdin // what follows is not looked at
		return f, 1, nil
	}
	if w.base64 {
		number -= '0'
	}
	var known bool
	if m.stream, known = w.channel(number); !known {
		return f, -1, fmt.Errorf("data on the unknown channel %d", number)
	}
	return f, 1, nil
}

func (w *webSocket) fromClient(b []byte) (int, error) {
	f, offset, err := w.next(&w.client, b, true)
	// What is typed is not looked at.
	if err != nil || offset < 0 || w.client.stream == stdin {
		return f.length, err
	}
	data, err := w.decode(f.unmasked(offset))
	if err != nil {
		return 0, err
	}
	return f.length, w.observer.fromClient(w.client.stream, data)
}

func (w *webSocket) fromServer(b []byte) (int, error) {
	f, offset, err := w.next(&w.server, b, false)
	if err != nil || offset < 0 {
		return f.length, err
	}
	data, err := w.decode(f.data[offset:])
	if err != nil {
		return 0, err
	}
	return f.length, w.observer.fromServer(w.server.stream, data)
}

// decode returns what data stands for.
func (w *webSocket) decode(data []byte) ([]byte, error) {
	if !w.base64 {
		return data, nil
	}
	decoded := make([]byte, base64.StdEncoding.DecodedLen(len(data)))
	n, err := base64.StdEncoding.Decode(decoded, data)
	if err != nil {
		return nil, fmt.Errorf("a message that is not base64: %w", err)
	}
	return decoded[:n], nil
}

func (w *webSocket) farewell(reason string) []byte {
	var b []byte
	if w.server.unfinished {
		// Nothing but the rest of it may follow. The connection ends without a
		// word.
		return nil
	}
	if w.out != noChannel {
		b = w.message(b, w.out, onTerminal(reason))
	}
	if w.errors != noChannel {
		b = w.message(b, w.errors, onErrorStream(reason, w.status))
	}
	return append(b, 0x80|opClose, 2, 1000>>8, 1000&0xff) // a normal end: what was sent counts
}

// message appends to b a message on a channel.
func (w *webSocket) message(b []byte, channel byte, data []byte) []byte {
	payload, opcode := append([]byte{channel}, data...), byte(opBinary)
	if w.base64 {
		payload, opcode = append([]byte{'0' + channel}, base64.StdEncoding.EncodeToString(data)...), opText
	}
	b = append(b, 0x80|opcode)
	if size := len(payload); size < 126 {
		b = append(b, byte(size))
	} else {
		b = append(b, 126, byte(size>>8&0xff), byte(size&0xff)) // not as long as 64 KiB
	}
	return append(b, payload...)
}
