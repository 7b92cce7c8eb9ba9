// Probabilities from an exported model, without Python.
//
//     predict MODEL.pt C H W < PIXELS
//
// PIXELS are uint8[N,C,H,W], nothing before, between or after the images. All N go through the model as one batch.
// Prints a line for each image: its K probabilities in the order of index_to_name.json, exact to the last bit.

#include <torch/script.h>

#include <charconv>
#include <cstdint>
#include <iostream>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

// Sixteen bits for each side, so that no product of three overflows.
std::int64_t parse_size(std::string_view text) {
    std::uint16_t size = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), size);
    if (error != std::errc{} || end != text.data() + text.size() || size == 0) {
        throw std::runtime_error("C, H and W are whole numbers from 1 to 65535, found '" + std::string(text) + "'");
    }
    return size;
}

void predict(const std::string& model_file, std::int64_t channels, std::int64_t height, std::int64_t width) {
    const c10::InferenceMode no_gradients;
    torch::jit::Module model = torch::jit::load(model_file, torch::kCPU);

    std::vector<char> pixels(std::istreambuf_iterator<char>(std::cin), {});
    const std::int64_t bytes = std::ssize(pixels), image_bytes = channels * height * width;
    if (bytes == 0 || bytes % image_bytes != 0) {
        throw std::runtime_error("the input has " + std::to_string(bytes) +
                                 " bytes, needed is a positive multiple of C*H*W = " + std::to_string(image_bytes));
    }

    const std::vector<std::int64_t> shape{bytes / image_bytes, channels, height, width};
    const torch::Tensor images = torch::from_blob(pixels.data(), shape, torch::kUInt8);
    const torch::Tensor probabilities = model.forward({images}).toTensor().contiguous();
    const auto rows = probabilities.accessor<float, 2>();
    std::cout.precision(std::numeric_limits<float>::max_digits10);
    for (std::int64_t image = 0; image < rows.size(0); ++image) {
        for (std::int64_t label = 0; label < rows.size(1); ++label) {
            std::cout << (label == 0 ? "" : " ") << rows[image][label];
        }
        std::cout << '\n';
    }
    if (!std::cout.flush()) throw std::runtime_error("the probabilities cannot be written");
}

// What LibTorch throws spans many lines: a traceback first, the reason last.
std::string last_line(std::string text) {
    text.erase(text.find_last_not_of(" \n") + 1);
    return text.substr(text.rfind('\n') + 1);
}

int main(int argc, char** argv) {
    try {
        if (argc != 5) throw std::runtime_error("usage: predict MODEL.pt C H W < PIXELS");
        predict(argv[1], parse_size(argv[2]), parse_size(argv[3]), parse_size(argv[4]));
    } catch (const c10::Error& error) {
        std::cerr << "error: " << argv[1] << ": " << last_line(error.what_without_backtrace()) << '\n';
        return 1;
    } catch (const std::exception& error) {
        std::cerr << "error: " << last_line(error.what()) << '\n';
        return 1;
    }
}
